"""Garbage collection: what old runs used alone goes, what newer runs need stays."""

from __future__ import annotations

import pytest

from moe.errors import BusyError
from orchestrator.executors.inline import InlineExecutor
from orchestrator.gc import collect, survey
from orchestrator.graph import build_graph
from orchestrator.plan import make_plan
from orchestrator.runs import RunStore
from tests.support.pipelines import go, pipeline


def spec(steps, value=1, name="toy"):
    """A pipeline whose first stage depends on ``value`` and whose second on ``steps``."""
    stages = {
        "numbers": {"kind": "numbers", "config": {"value": value, "count": 2, "size_kb": 4}},
        "slow": {"kind": "sleepy", "inputs": {"start": "${stages.numbers}"}, "config": {"steps": steps}},
        "report": {"kind": "gather", "inputs": {"numbers": "${stages.slow}"}},
    }
    return pipeline(stages, name=name)


def test_only_what_old_runs_used_alone_goes(store):
    (_, old), (_, new) = go(spec(3), store), go(spec(4), store)
    garbage = survey(store, keep_last=1)
    assert garbage.runs == [old.id]
    lost = {old.artifacts()[node] for node in ("slow/seed=0", "report")}
    assert set(garbage.artifacts) == lost  # the numbers are shared
    assert garbage.bytes == sum(store.artifact(digest).bytes for digest in lost)
    collect(store, garbage)
    assert set(store.digests()) == set(new.artifacts().values())
    assert [run.id for run in RunStore(store).list()] == [new.id]
    plan = make_plan(build_graph(spec(4)), store)
    assert plan.count("hit") == 4
    assert make_plan(build_graph(spec(3)), store).entries["slow/seed=0"].state == "miss"


def test_survey_removes_nothing(store):
    _, run = go(spec(3), store)
    garbage = survey(store, keep_last=0)
    assert garbage.runs == [run.id] and len(garbage.artifacts) == 4 and len(garbage.keys) == 4
    assert len(store.digests()) == 4 and RunStore(store).list()


def test_every_pipeline_keeps_its_newest(store):
    for name in ("a", "b"):
        for steps in (3, 4):
            go(spec(steps, name=name), store)
    garbage = survey(store, keep_last=1)
    assert sorted(run.split("-")[0] for run in garbage.runs) == ["a", "b"]


def test_checkpoints_of_a_run_that_can_resume_stay(store):
    stages = {"slow": {"kind": "sleepy", "config": {"steps": 9, "crash_at": 7, "checkpoint_every": 2}}}
    go(pipeline(stages), store)
    scratch = list((store.folder / "scratch").iterdir())
    assert scratch and not survey(store, keep_last=1).scratch
    garbage = survey(store, keep_last=0)
    assert set(garbage.scratch) == set(scratch)
    collect(store, garbage)
    assert not list((store.folder / "scratch").iterdir())


def test_resume_after_collection_gives_the_same_artifacts(store):
    outcome, run = go(spec(3), store, InlineExecutor())
    collect(store, survey(store, keep_last=0))
    again, _ = go(spec(3), store)
    assert again.hits == 0 and again.artifacts == outcome.artifacts
    assert not (store.folder / "runs" / run.id).exists()


def test_half_written_leftovers_go(store):
    go(spec(3), store)
    (store.staging() / "half").write_bytes(b"x" * 1000)
    garbage = survey(store, keep_last=5)
    assert not garbage.runs and not garbage.artifacts and garbage.bytes == 1000
    collect(store, garbage)
    assert not list((store.folder / "staging").iterdir())


def test_nothing_is_removed_while_a_run_runs(store):
    go(spec(3), store)
    run = RunStore(store).create(spec(4))
    with run.lock():
        garbage = survey(store, keep_last=0)
        assert garbage.busy == [run.id] and run.id not in garbage.runs
        with pytest.raises(BusyError):
            collect(store, garbage)
    assert len(store.digests()) == 4


def test_verify_removes_what_was_changed_so_that_it_is_made_again(store):
    outcome, _ = go(spec(3), store)
    digest = outcome.artifacts["numbers/seed=0/item=1"]
    file = store.local_path(store.artifact(digest)) / "filler.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert make_plan(build_graph(spec(3)), store).count("hit") == 4  # the size is right
    assert not survey(store, keep_last=5).artifacts
    garbage = survey(store, keep_last=5, verify=True)
    assert list(garbage.damaged) == list(garbage.artifacts) == [digest] and "filler.bin" in garbage.damaged[digest]
    collect(store, garbage)
    again, _ = go(spec(3), store)
    assert again.hits == 3 and again.artifacts == outcome.artifacts
    assert not survey(store, keep_last=5, verify=True).damaged
