import logging
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import orchestrator.context as context_module
from moe.errors import DataError, EnvironmentProblem, MoepipeError, RunFailed
from orchestrator.context import readable
from orchestrator.executors.inline import InlineExecutor
from orchestrator.store import Store
from tests.support.pipelines import DIAMOND, go, pipeline
from tests.support.toy_stages import numbers, sleepy


def run_as(monkeypatch, store, body, **stage):
    """One member whose ``run`` is ``body(context)``."""

    def run(self, config, member, context):
        return body(context) or {}

    monkeypatch.setattr(numbers.Stage, "run", run)
    return go(pipeline({"a": {"kind": "numbers", **stage}}), store)


def test_what_a_stage_sees(monkeypatch, store):
    seen = {}

    def body(context):
        seen.update(vars(context))
        assert list(context.output.iterdir()) == [] and context.scratch.is_dir()
        context.progress(1, 2, loss=0.5)
        context.metrics({"a/b": 1}, step=3)
        context.log("hello")
        (context.output / "x").write_text("x")

    outcome, run = run_as(monkeypatch, store, body, resources={"threads": 2})
    assert outcome.status == "finished" and seen["threads"] == 2 and seen["member"] == "seed=0"
    events = {event.kind: event.data for event in run.events()}
    assert events["member-progress"] == {"done": 1, "total": 2, "values": {"loss": 0.5}}
    assert events["member-metrics"] == {"values": {"a/b": 1.0}, "step": 3}
    assert events["member-log"] == {"message": "hello"}
    assert not seen["scratch"].exists() and not seen["output"].exists()


def test_progress_is_limited_and_the_last_state_arrives(store):
    _, run = go(pipeline({"s": {"kind": "sleepy", "config": {"steps": 500, "step_s": 0.001}}}), store)
    events = [event for event in run.events() if event.kind == "member-progress"]
    told, times = [event.data["done"] for event in events], [event.time for event in events]
    assert told[-1] == 500 and told == sorted(told)
    # Five a second, however long it takes; the last state does not wait for its turn.
    assert all(after - before > 0.19 for before, after in pairwise(times[:-1]))


def test_prints_logging_and_warnings_go_to_the_log_and_the_terminal(monkeypatch, store, capsys):
    def body(context):
        print("printed")
        print("to stderr", file=sys.stderr)
        logging.getLogger("somewhere").warning("warned")
        context.log("said")

    _, run = run_as(monkeypatch, store, body)
    log = run.log_path("a/seed=0").read_text()
    assert all(words in log for words in ("printed", "to stderr", "WARNING somewhere: warned", "said"))
    assert "printed" in capsys.readouterr().out
    assert not isinstance(sys.stdout, type(None)) and "_Tee" not in type(sys.stdout).__name__


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("first\nlast line"), RunFailed, "a/seed=0 failed: ValueError: last line."),
        (DataError("The image x.png is corrupt.", "Fetch it again."), DataError, "The image x.png is corrupt."),
        (OSError(28, "No space left on device", "/tmp/x"), EnvironmentProblem, "No space left to write /tmp/x"),
        (KeyError(), RunFailed, "a/seed=0 failed: KeyError."),
        (SystemExit(3), RunFailed, "a/seed=0 failed: SystemExit: 3."),
    ],
)
def test_errors_become_one_sentence_and_the_traceback_stays_in_the_log(monkeypatch, store, error, kind, words):
    def body(context):
        raise error

    outcome, run = run_as(monkeypatch, store, body)
    assert type(outcome.error) is kind and words in outcome.error.message
    assert "Traceback (most recent call last)" in run.log_path("a/seed=0").read_text()
    assert pickle.loads(pickle.dumps(outcome.error)).message == outcome.error.message
    assert not any((store.folder / "staging").iterdir()) and store.digests() == []


def test_an_error_that_does_not_pickle_is_told_all_the_same():
    class OddError(MoepipeError):
        def __init__(self, a, b, c):
            super().__init__("odd")

    assert type(readable(OddError(1, 2, 3), "n", Path("log"))) is RunFailed


def test_an_artifact_is_not_made_from_what_is_not_json(monkeypatch, store):
    outcome, _ = run_as(monkeypatch, store, lambda context: {"path": context.output})
    assert outcome.status == "failed" and "not plain JSON" in outcome.error.message


def test_code_that_changes_while_the_run_goes_on_is_refused(monkeypatch, store):
    real = context_module.code_digests

    def changed(modules):
        return {**real(modules), "moe/meta_step.py": "edited"}

    monkeypatch.setattr(context_module, "code_digests", changed)
    outcome, _ = go(pipeline({"a": {"kind": "numbers"}}), store)
    assert outcome.status == "failed" and "moe/meta_step.py changed while the run was going on" in outcome.error.message
    assert outcome.error.code == "code-changed"


def test_a_gang_runs_at_world_size_one_and_says_so(store):
    outcome, run = go(pipeline({"g": {"kind": "gang", "config": {"value": 4}, "resources": {"workers": 2}}}), store)
    assert store.artifact(outcome.artifacts["g/seed=0"]).meta == {"value": 5}
    told = [event.data["message"] for event in run.events() if event.kind == "member-log"]
    assert "resources.workers=2 has no effect here: one rank does all of the work" in told


def test_only_a_gang_may_train_and_its_config_is_json(monkeypatch, store):
    outcome, _ = run_as(monkeypatch, store, lambda context: context.train(print, {}))
    assert "is not a gang" in outcome.error.message
    monkeypatch.setattr(numbers.Stage, "gang", True)
    outcome, _ = run_as(monkeypatch, store, lambda context: context.train(print, {"x": object()}))
    assert "not plain JSON" in outcome.error.message


def test_a_crash_goes_on_from_its_checkpoint(store, tmp_path):
    config = {"steps": 30, "checkpoint_every": 5}
    calm, _ = go(pipeline({"s": {"kind": "sleepy", "config": config}}), Store.open(tmp_path / "calm"))
    crashing = {"s": {"kind": "sleepy", "config": {**config, "crash_at": 17, "crash_how": "memory"}}}
    outcome, run = go(pipeline(crashing), store)
    assert outcome.status == "finished"
    assert "continues at step 15" in run.log_path("s/seed=0").read_text()
    assert outcome.artifacts == calm.artifacts  # crash settings change the key, not the bytes


def test_a_memory_store_serves_the_inline_executor(tmp_path):
    store = Store.open(f"memory://run-{tmp_path.name}", tmp_path / "cache")
    first, _ = go(pipeline(DIAMOND), store)
    again, _ = go(pipeline(DIAMOND), store)
    folder, _ = go(pipeline(DIAMOND), Store.open(tmp_path / "folder"))
    assert first.status == "finished" and again.hits == 8
    assert first.artifacts == again.artifacts == folder.artifacts


def test_ctrl_c_inside_a_member_interrupts_the_run(monkeypatch, store):
    def body(context):
        raise KeyboardInterrupt

    outcome, run = run_as(monkeypatch, store, body)
    assert outcome.status == run.status == "interrupted"


def test_inputs_and_members_arrive_in_order(monkeypatch, store):
    stages = {
        "a": {"kind": "numbers", "config": {"count": 12}},
        "all": {"kind": "gather", "inputs": {"numbers": ["${stages.a}"]}},
    }
    outcome, _ = go(pipeline(stages, seeds=(0, 1)), store)
    members = store.artifact(outcome.artifacts["all"]).meta["members"]
    assert members == [f"seed={seed}/item={item}" for seed in (0, 1) for item in range(12)]


def test_threads_are_set(monkeypatch, store):
    import os

    seen = []
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_as(monkeypatch, store, lambda context: seen.append(os.environ["OMP_NUM_THREADS"]), resources={"threads": 3})
    assert seen == ["3"]


def test_closing_forgets_what_has_not_begun(store):
    executor = InlineExecutor()
    executor.start(object())
    executor.close()
    executor.poll(0.0, pytest.fail)
    assert sleepy.Stage.output == "number"
