import json
from dataclasses import replace

import pytest

from moe.errors import InfeasibleError, NotFoundError
from orchestrator.capacity import Capacity, Ledger
from orchestrator.graph import build_graph
from orchestrator.plan import make_plan
from orchestrator.spec import Resources
from tests.support.pipelines import DIAMOND, go, pipeline

SMALL = Capacity(({"cpus": 2.0, "gpus": 0.0, "memory_gb": 4.0},))


def plan(stages, store, **options):
    return make_plan(build_graph(pipeline(stages)), store, None, store.folder / "data", **options)


def test_before_the_first_run(store):
    made = plan(DIAMOND, store)
    entries = made.entries
    assert entries["numbers/seed=0/item=0"].reason == "first time"
    assert entries["squares/seed=0/item=1"].state == "blocked"
    assert entries["squares/seed=0/item=1"].reason == "waits for numbers/seed=0/item=1, which will be rebuilt"
    assert "and 2 more" in entries["total/seed=0"].reason
    assert (made.count("hit"), made.count("miss"), made.count("blocked")) == (0, 3, 5)
    assert made.unknown == 8 and made.critical_s == 0.0
    assert [name.partition("/")[0] for name in made.critical_path] == ["numbers", "squares", "total", "all"]


def test_after_a_run_everything_hits_and_a_change_is_explained(store):
    go(pipeline(DIAMOND), store)
    done = plan(DIAMOND, store)
    assert done.count("hit") == 8 and done.critical_path == () and done.total_s == 0.0
    changed = plan({**DIAMOND, "total": {**DIAMOND["total"], "config": {"factor": 3}}}, store)
    assert changed.entries["total/seed=0"].reason == "config.factor changed from 1 to 3"
    assert changed.entries["all"].state == "blocked" and changed.count("hit") == 6
    assert changed.unknown == 0 and changed.entries["total/seed=0"].bytes > 0


def test_the_plan_tells_what_the_run_then_does(store):
    go(pipeline(DIAMOND), store)
    changed = {**DIAMOND, "numbers": {"kind": "numbers", "config": {"count": 3, "value": 2}}}
    before = plan(changed, store)
    outcome, _ = go(pipeline(changed), store)
    assert outcome.hits >= before.count("hit")
    assert before.entries["numbers/seed=0/item=0"].reason == "config.value changed from 1 to 2"


def test_estimates_are_medians_of_like_members_and_add_up_along_the_critical_path(store):
    stages = {"slow": {"kind": "numbers", "config": {"sleep_s": 0.2}}, "fast": {"kind": "numbers"}}
    go(pipeline(stages), store)
    took = {record.node: record for record in store.records()}
    assert took["slow/seed=0"].seconds >= 0.2
    # On a machine that stood still meanwhile the fast one may have been the slow one.
    store.remember(replace(took["slow/seed=0"], seconds=3.0))
    store.remember(replace(took["fast/seed=0"], seconds=1.0))
    again = {name: {**stage, "config": {**stage.get("config", {}), "value": 9}} for name, stage in stages.items()}
    made = plan(again, store)
    assert made.critical_path == ("slow/seed=0",) and (made.critical_s, made.total_s) == (3.0, 4.0)
    same = plan({"slow": {**stages["slow"], "resources": {"threads": 2}}}, store)
    assert same.entries["slow/seed=0"].estimate_s == 3.0
    assert same.entries["slow/seed=0"].reason == "threads changed from 1 to 2"


def test_the_plan_is_json(store):
    record = json.loads(json.dumps(plan(DIAMOND, store, capacity=SMALL).to_json()))
    assert record["feasible"] is True and record["counts"] == {"hit": 0, "miss": 3, "blocked": 5}
    assert record["entries"][0]["node"] == "numbers/seed=0/item=0"


def test_what_cannot_fit_is_named_with_what_was_asked_and_what_there_is(store):
    made = plan({"a": {"kind": "numbers", "resources": {"cpus": 3}}}, store, capacity=SMALL)
    assert not made.feasible
    with pytest.raises(InfeasibleError, match=r"a/seed=0 asks for 3 cpus; the machine has 2 cpus") as error:
        made.require_feasible()
    assert error.value.exit_code == 3
    gang = plan({"g": {"kind": "gang", "resources": {"workers": 3}}}, store, capacity=SMALL)
    assert gang.infeasible == ("g/seed=0 asks for 3 ranks with 1 cpus each; the machine has 2 cpus",)
    go(pipeline({"a": {"kind": "numbers"}}), store)
    assert plan({"a": {"kind": "numbers", "resources": {"cpus": 3}}}, store, capacity=SMALL).feasible  # it is a hit


def test_missing_data_is_a_problem_of_the_plan(store, monkeypatch):
    from tests.support.toy_stages.numbers import Stage

    def external(self, config, data_root):
        raise NotFoundError("The file digits.npz is missing.", "Fetch it.")

    monkeypatch.setattr(Stage, "external", external)
    made = plan({"a": {"kind": "numbers"}}, store)
    assert made.problems == ("The file digits.npz is missing. Fetch it.",)
    assert made.entries["a/seed=0"].state == "blocked"


def test_the_ledger_places_whole_nodes_on_machines():
    ledger = Ledger(Capacity(({"cpus": 2.0}, {"cpus": 1.0, "gpus": 1.0, "spot": 1.0})))
    assert ledger.take("gang", Resources(workers=3))
    assert not ledger.take("more", Resources(cpus=0.5))
    ledger.give_back("gang")
    assert ledger.take("gpu", Resources(cpus=1, gpus=0.5, custom={"spot": 1}))
    assert not ledger.take("gpu2", Resources(cpus=0, gpus=0.6))
    assert not ledger.take("wide", Resources(cpus=1, workers=3)) and ledger.take("two", Resources(cpus=1, workers=2))
    ledger.resize(Capacity(({"cpus": 2.0},)))
    assert not ledger.take("late", Resources(cpus=1))
    ledger.give_back("two")
    assert ledger.take("late", Resources(cpus=1))
