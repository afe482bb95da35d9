"""The search stage, one trial after the other in this process."""

from __future__ import annotations

import csv
import json
import threading
from typing import ClassVar

import numpy as np
import pytest
from ruamel.yaml import YAML

from moe.errors import InfeasibleError, RunFailed, SpecError
from orchestrator.admission import Admission
from orchestrator.capacity import Capacity
from orchestrator.codedigest import code_digests
from orchestrator.context import CodeChanged
from orchestrator.gc import collect, survey
from orchestrator.graph import build_graph
from orchestrator.loading import load
from orchestrator.plan import make_plan
from orchestrator.positions import SpecErrors
from orchestrator.search_result import describe_searches, search_lines
from orchestrator.search_selection import check_selection
from orchestrator.stages.search import SearchConfig
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline
from workers.context import Input

XS = {"choice": [0.1, 0.4, 0.8]}


def search(space=None, name="s", **config):
    """A pipeline of one search over the toy score."""
    own = {
        "stage": {"kind": "score", **config.pop("stage", {})},
        "space": {"x": XS} if space is None else space,
        "metric": "scores.score",
        "selection": "training_domains",
        "algorithm": "grid",
        "figures": False,
        **config,
    }
    return {name: {"kind": "search", "config": own}}


def done(store, stages, **options):
    """Run and return (outcome, the search's folder, its meta, its log)."""
    outcome, run = go(pipeline(stages), store, **options)
    assert outcome.status == "finished", outcome.error
    artifact = store.artifact(outcome.artifacts["s/seed=0"])
    return outcome, store.local_path(artifact), artifact.meta, run.log_path("s/seed=0").read_text()


def test_costs_what_all_of_its_trials_cost(store):
    from orchestrator.compare_cost import Clock, training_hours
    from orchestrator.compare_read import read_run

    outcome, run = go(pipeline(search(stage={"config": {"steps": 2, "step_s": 0.05, "fail_above": 0.5}})), store)
    assert outcome.status == "finished"
    known = [record.seconds for record in store.records() if record.parts["kind"] == "score"]
    hours = training_hours(read_run(run), ["s"], 0, Clock(store))
    assert hours is not None and len(known) == 2 and sum(known) >= 0.2
    assert hours.hours == pytest.approx(sum(known) / 3600) and hours.missing == 1  # of the trial that failed


def failure(store, stages):
    outcome, _ = go(pipeline(stages), store)
    assert outcome.status == "failed"
    return outcome.error


def trials(folder):
    return json.loads((folder / "search/trials.json").read_text())["trials"]


def test_gives_out_the_best_trial_under_the_wrapped_stages_names(store):
    stages = {**search(figures=True), "after": {"kind": "sum", "inputs": {"numbers": "${stages.s}"}}}
    outcome, folder, meta, log = done(store, stages)
    assert json.loads((folder / "trace.json").read_text()) == {"x": 0.4}
    assert meta["scores"]["score"] == pytest.approx(0.99) and meta["value"] == 0
    assert meta["search"]["best"]["values"] == {"x": 0.4} and meta["search"]["trials"]["done"] == 3
    assert "after/seed=0" in outcome.artifacts
    best = YAML(typ="safe").load((folder / "search/best.yaml").read_text())
    assert best["kind"] == "score" and best["config"]["x"] == 0.4
    rows = list(csv.DictReader((folder / "search/trials.csv").open()))
    assert [row["x"] for row in rows] == ["0.1", "0.4", "0.8"] and rows[1]["scores.score"] == "0.99"
    for name in ("history", "parallel"):
        assert (folder / f"search/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "best: trial 1, 0.99, x=0.4. 3 trials: 0 from the store, 3 run now" in log


def test_importance_is_that_of_the_dimension_that_matters(store):
    space = {"x": {"choice": [0.1, 0.3, 0.9]}, "cost": {"choice": [1, 2, 3]}}
    _, folder, _, _ = done(store, search(space, figures=True))
    shares = json.loads((folder / "search/trials.json").read_text())["importance"]
    assert shares["x"] > 0.95 and shares["cost"] < 0.05
    assert (folder / "search/importance.png").exists()


def test_a_trial_has_the_key_of_the_ordinary_stage(store):
    ordinary = {"s": {"kind": "score", "config": {"x": 0.4}}}
    first, _ = go(pipeline(ordinary), store)
    _, _, meta, log = done(store, search())
    assert "trial 1: 0.99 (from the store)" in log and "1 from the store, 2 run now" in log
    assert first.artifacts["s/seed=0"] in meta["search"]["artifacts"]
    after, _ = go(pipeline({"s": {"kind": "score", "config": {"x": 0.8}}}), store)
    assert after.hits == 1


def test_a_named_stage_shares_its_artifacts(store):
    both = {**search(), "plain": {"kind": "score", "config": {"x": 0.1, "noise": 1.0}}}
    both["s"]["config"]["stage"]["config"] = {"noise": 1.0}
    both["s"]["seed_name"] = "plain"
    outcome, _ = go(pipeline(both), store)
    meta = store.artifact(outcome.artifacts["s/seed=0"]).meta
    assert outcome.artifacts["plain/seed=0"] in meta["search"]["artifacts"]


def test_a_widened_grid_runs_only_the_new_points(store):
    done(store, search())
    _, _, meta, log = done(store, search({"x": {"choice": [0.1, 0.3, 0.4, 0.8]}}))
    assert "3 from the store, 1 run now" in log and meta["search"]["best"]["values"] == {"x": 0.3}
    _, _, _, log = done(store, search({"x": {"choice": [0.1, 0.3]}, "cost": {"choice": [1, 2]}}))
    assert "2 from the store, 2 run now" in log  # a new dimension: the points at the written value are there


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_a_widened_range_takes_over_what_lies_inside(store, algorithm):
    first = {"algorithm": algorithm, "trials": 6, "startup": 3, "batch": 2}
    _, small, _, _ = done(store, search({"x": {"uniform": [0.4, 0.9]}}, **first))
    _, large, meta, log = done(store, search({"x": {"uniform": [0.1, 0.9]}}, **{**first, "trials": 10}))
    assert "6 from the store, 4 run now" in log
    old = {trial["values"]["x"] for trial in trials(small)}
    assert old == {trial["values"]["x"] for trial in trials(large) if trial["source"] == "earlier"}
    assert meta["search"]["best"]["objective"][0] >= max(t["objective"][0] for t in trials(small))
    _, narrow, _, log = done(store, search({"x": {"uniform": [0.6, 0.7]}}, **{**first, "trials": 4}))
    assert all(0.6 <= trial["values"]["x"] <= 0.7 for trial in trials(narrow))
    _, alone, _, log = done(store, search({"x": {"uniform": [0.1, 0.9]}}, reuse=False, **{**first, "trials": 3}))
    assert not any(trial["source"] == "earlier" for trial in trials(alone))


def test_the_first_point_is_the_config_as_written(store):
    _, folder, _, _ = done(store, search({"x": {"uniform": [0.0, 1.0]}}, algorithm="random", trials=2))
    assert trials(folder)[0]["values"] == {"x": 0.9}
    other = search({"x": {"uniform": [0.0, 0.5]}}, algorithm="random", trials=2)
    _, folder, _, _ = done(store, other)  # 0.9 is outside
    assert all(trial["values"]["x"] <= 0.5 for trial in trials(folder))


def test_a_search_that_was_cut_off_ends_with_the_same_bytes(store, tmp_path):
    config = {"algorithm": "tpe", "trials": 8, "startup": 4, "batch": 2, "stage": {"config": {"steps": 2}}}
    space = {"x": {"uniform": [0, 1]}, "form": {"choice": ["plain", "bent"]}}
    space["bend"] = {"uniform": [0, 1], "when": {"form": "bent"}}
    whole, _, _, _ = done(Store.open(tmp_path / "whole"), search(space, **config))
    stop = threading.Event()

    def interrupt(event):
        if event.kind == "member-log" and event.data["message"].startswith("trial 2:"):
            stop.set()

    cut, _ = go(pipeline(search(space, **config)), store, listeners=[interrupt], stop=stop)
    assert cut.status == "interrupted"
    again, _, _, log = done(store, search(space, **config))
    assert again.artifacts == whole.artifacts
    assert "3 from the store, 5 run now" in log


def test_conditional_dimensions_are_only_where_they_belong(store):
    space = {"form": {"choice": ["plain", "bent"]}, "bend": {"choice": [0.5, 0.7], "when": {"form": "bent"}}}
    _, folder, _, _ = done(store, search(space))
    assert [trial["values"] for trial in trials(folder)] == [
        {"form": "plain"}, {"form": "bent", "bend": 0.5}, {"form": "bent", "bend": 0.7},
    ]  # fmt: skip


def test_failed_trials_are_counted_and_named(store):
    _, folder, meta, log = done(store, search(stage={"config": {"fail_above": 0.7}}))
    assert meta["search"]["trials"] == {"done": 2, "failed": 1, "stopped": 0}
    (failed,) = (trial for trial in trials(folder) if trial["state"] == "failed")
    assert failed["values"] == {"x": 0.8} and "x = 0.8 is too much" in failed["error"]
    assert "trial 2: failed: " in log and "x = 0.8 is too much" in (folder / "search/trials.md").read_text()


def test_an_objective_that_is_not_a_number_is_a_failed_trial(store):
    _, folder, meta, _ = done(store, search(stage={"config": {"nan_above": 0.7}}))
    assert meta["search"]["trials"]["failed"] == 1 and trials(folder)[2]["state"] == "failed"


def test_a_search_whose_trials_all_fail_fails_early(store):
    config = {"algorithm": "random", "trials": 50, "stage": {"config": {"fail_above": 0.0}}}
    error = failure(store, search({"x": {"uniform": [0.1, 1]}}, **config))
    assert isinstance(error, RunFailed) and "All of the first 5 trials failed" in error.message
    assert "is too much" in error.message


def test_a_search_whose_code_changes_ends_at_once(store, monkeypatch):
    from orchestrator import context

    calls = []

    def digests(modules):
        calls.append(modules)
        found = code_digests(modules)
        return found if len(calls) < 3 else dict.fromkeys(found, "other")  # the search itself, and its first trial

    monkeypatch.setattr(context, "code_digests", digests)
    error = failure(store, search())
    assert isinstance(error, CodeChanged) and "changed while the run was going on" in error.message
    monkeypatch.undo()
    _, _, _, log = done(store, search())
    assert "1 from the store, 2 run now" in log


def test_too_few_successes(store):
    error = failure(store, search(stage={"config": {"fail_above": 0.2}}, min_trials=2))
    assert "1 of 3 trials succeeded, 2 must" in error.message and "x = 0.4 is too much" in error.message


def test_a_metric_that_nobody_reports_names_those_that_exist(store):
    error = failure(store, search(metric="scores.scor"))
    assert isinstance(error, SpecError) and "'scores.scor'" in error.message
    assert "Did you mean 'scores.score'? Allowed: scores.cost, scores.score, value." in error.hint


def test_several_metrics_make_a_front(store):
    space = {"x": {"choice": [0.3, 0.8, 0.9]}, "cost": {"choice": [1, 2]}}
    config = {"metric": ["scores.score", "scores.cost"], "mode": ["max", "min"], "figures": True}
    _, folder, meta, _ = done(store, search(space, **config))
    assert meta["search"]["best"]["values"] == {"x": 0.3, "cost": 1}
    assert json.loads((folder / "search/trials.json").read_text())["front"] == [0]
    assert (folder / "search/front.png").exists()
    _, folder, _, _ = done(store, search(space, **config, algorithm="tpe", trials=6, startup=3, batch=3))
    assert len(trials(folder)) == 6


def test_several_seeds_are_averaged_and_the_first_is_given_out(store):
    _, folder, meta, _ = done(store, search(seeds=3, stage={"config": {"noise": 0.1}}))
    for trial in trials(folder):
        runs = [run[0] for run in trial["runs"]]
        assert len(set(runs)) == 3 and trial["objective"][0] == pytest.approx(sum(runs) / 3)
    best = trials(folder)[meta["search"]["best"]["trial"]]
    assert meta["scores"]["score"] == best["runs"][0][0]


def test_restarts_try_other_seeds(store):
    restarts = search({}, algorithm="restarts", trials=4, stage={"config": {"noise": 1.0}})
    _, folder, meta, _ = done(store, restarts)
    scores = [trial["objective"][0] for trial in trials(folder)]
    assert len(set(scores)) == 4 and meta["scores"]["score"] == max(scores)
    ordinary, _ = go(pipeline({"s": {"kind": "score", "config": {"noise": 1.0}}}), store)
    assert ordinary.hits == 1  # the first restart is the ordinary stage


def test_every_member_of_a_fan_out_is_searched(store):
    stage = {"kind": "numbers", "config": {"count": 3}}
    stages = search({"value": {"choice": [1, 4]}}, metric="value", stage=stage)
    stages["sq"] = {"kind": "square", "inputs": {"number": "${stages.s}"}, "config": {"count": 3}}
    outcome, _ = go(pipeline(stages), store)
    values = [store.artifact(outcome.artifacts[f"sq/seed=0/item={i}"]).meta["value"] for i in range(3)]
    assert outcome.status == "finished" and values == [16, 25, 36]


def test_inputs_of_the_wrapped_stage_reach_the_trials(store):
    stages = {"base": {"kind": "numbers", "config": {"value": 5}}, **search()}
    stages["s"]["inputs"] = {"start": "${stages.base}"}
    _, _, meta, _ = done(store, stages)
    assert meta["scores"]["score"] == pytest.approx(5.99)


def test_trials_of_a_kept_search_survive_gc(store):
    done(store, search())
    collect(store, survey(store, keep_last=1))
    _, _, _, log = done(store, search({"x": {"choice": [0.1, 0.4, 0.8, 0.9]}}))
    assert "3 from the store, 1 run now" in log


def test_a_trial_that_cannot_fit_is_refused_by_the_plan(store):
    stages = search()
    stages["s"]["resources"] = {"gpus": 3}
    plan = make_plan(build_graph(pipeline(stages)), store, capacity=Capacity(({"cpus": 2.0, "gpus": 0.0},)))
    with pytest.raises(InfeasibleError, match="3 gpus"):
        plan.require_feasible()


BAD = """
apiVersion: moepipe/v1
name: bad
stages:
  s:
    kind: search
    config:
      stage: {kind: score, config: {steps: 2}}
      space:
        x: {uniform: [0, 2]}
        costt: {int: [1, 2]}
        form: {choice: [plain, bennt]}
        bend: {uniform: [0, 1], when: {form: bent}}
      metric: scores.score
      selection: training_domains
      trials: 3
"""


def problems(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpecErrors) as caught:
        load(path)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def test_mistakes_in_the_space_are_told_with_their_lines(tmp_path):
    found = problems(tmp_path, BAD.replace(", when: {form: bent}", ""))
    assert [text.partition(" ")[0] for text in found] == ["10:9:", "11:9:", "12:9:"]
    assert "the value 2: expected a value of at most 1" in found[0]
    assert "has no field 'costt'. Did you mean 'cost'?" in found[1]
    assert "expected 'plain' or 'bent', found 'bennt'. Did you mean 'bent'?" in found[2]
    (found,) = problems(tmp_path, BAD)
    assert found.startswith("13:") and "'form' never takes \"bent\"" in found


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("kind: score", "kind: scor", 8, "no stage kind named 'scor'. Did you mean 'score'?"),
        ("kind: score", "kind: search", 8, "cannot search over a search"),
        ("{steps: 2}", "{step: 2}", 8, "is not a known key. Did you mean 'steps'?"),
        ("{steps: 2}", "{steps: 0}", 8, "expected a value of at least 1"),
        ("{steps: 2}", "{val_split: test}", 8, "metrics are of test domains"),
        ("scores.score", "test.score", 14, "a metric of test domains"),
        ("training_domains", "oracle", 15, "'training_domains' or 'validation_domains'"),
        ("trials: 3", "algorithm: random", 8, "random needs a number of trials"),
        ("trials: 3", "algorithm: grid", 10, "a grid needs listed values"),
        ("trials: 3", "trials: 3\n      algorithm: restarts", 8, "leave out the space"),
        ("trials: 3", "trials: 3\n      mode: [max, min]", 8, "1 metrics, but 2 modes"),
        ("trials: 3", "trials: 3\n      scheduler: asha\n      seeds: 2", 8, "set seeds: 1"),
        ("x: {uniform: [0, 2]}", "x: {uniform: [0, 1], choice: [1]}", 10, "exactly one of"),
        ("x: {uniform: [0, 2]}", "val_split: {choice: [val, test]}", 8, "metrics are of test domains"),
        (
            "space:\n        x: {uniform: [0, 2]}",
            "space:\n        x: {uniform: [0, -1]}",
            10,
            "first end must be below",
        ),
    ],
)
def test_mistakes_are_told_with_line_and_hint(tmp_path, before, after, line, words):
    good = BAD.replace("bennt", "bent").replace("costt", "cost").replace("[0, 2]", "[0, 1]")
    before, after = before.replace("[0, 2]", "[0, 1]"), after.replace("[0, 2]", "[0, 1]")
    assert before in good
    found = problems(tmp_path, good.replace(before, after, 1))
    assert any(text.startswith(f"{line}:") and words in text for text in found), found


def test_a_space_that_changes_the_fan_out_is_refused(tmp_path):
    text = BAD[: BAD.index("      stage:")] + "      stage: {kind: numbers}\n      space: {count: {choice: [1, 3]}}\n"
    (found,) = problems(tmp_path, text + BAD[BAD.index("      metric:") :])
    assert "the value 3 makes 3 members, the config as written 1" in found


def test_ports_are_those_of_the_wrapped_stage(tmp_path):
    good = BAD.replace("bennt", "bent").replace("costt", "cost").replace("[0, 2]", "[0, 1]")
    wrong = good.replace("    config:\n      stage", "    inputs: {strat: '${stages.n}'}\n    config:\n      stage")
    (found,) = problems(tmp_path, wrong + "  n: {kind: numbers}\n")
    assert "no input 'strat'. Did you mean 'start'?" in found


def test_the_end_of_a_submit_says_what_was_found(store):
    outcome, _, _, _ = done(store, search(stage={"config": {"fail_above": 0.7}}))
    (found,) = describe_searches(build_graph(pipeline(search())), store, outcome.artifacts)
    assert found["best"]["values"] == {"x": 0.4} and found["trials"]["failed"] == 1
    assert search_lines([found]) == ["s/seed=0: scores.score 0.99 with x=0.4 (2 trials, 1 failed)"]


@pytest.fixture
def rows(tmp_path):
    """A ``data`` artifact of three domains: 0 and 1 are trained on, 2 is for validation, 3 for the test."""
    domain = np.repeat(np.arange(4), 5)
    splits = {"train": [0, 1, 5, 6], "id_val": [2, 7], "val": [10, 11], "test": [15, 16], "leaky": [10, 17]}
    arrays = {f"split/{name}": np.array(rows) for name, rows in splits.items()}
    np.savez(tmp_path / "index.npz", labels=domain, metadata=domain[:, None], **arrays)
    meta = {"dataset": "rotated14", "fields": ["domain"], "options": {}}
    return Input("data", "0" * 64, tmp_path, meta)


@pytest.mark.parametrize(
    ("split", "selection", "words"),
    [
        ("id_val", "training_domains", None),
        ("val", "validation_domains", None),
        ("val", "training_domains", "domains that are not trained on"),
        ("id_val", "validation_domains", "of training domains"),
        ("leaky", "validation_domains", "rows of test domains"),
    ],
)
def test_the_declared_selection_is_held_against_the_rows(rows, split, selection, words):
    stage = {"kind": "score", "config": {"val_split": split}}
    config = SearchConfig(stage=stage, metric="scores.score", selection=selection, trials=1)

    class Context:
        inputs: ClassVar = {"data": [rows]}

    if words is None:
        check_selection(config, Context())
    else:
        with pytest.raises(SpecError, match=words):
            check_selection(config, Context())


@pytest.mark.parametrize(("cpus", "concurrency", "slots"), [(1, "auto", 3), (2, "auto", 2), (4, "auto", 1), (1, 2, 2)])
def test_a_search_takes_as_much_as_its_trials_can_use(cpus, concurrency, slots):
    stages = {**search(concurrency=concurrency), "other": {"kind": "numbers", "resources": {"cpus": 4}}}
    stages["s"]["resources"] = {"cpus": cpus}
    room = Admission(build_graph(pipeline(stages)), lambda: Capacity(({"cpus": 4.0},)))
    room.open(["s/seed=0", "other/seed=0"])
    assert room.take("s/seed=0") and room.slots("s/seed=0") == slots
    assert not room.take("other/seed=0")
    room.give_back("s/seed=0")
    room.new_round()
    assert room.take("other/seed=0") and room.slots("other/seed=0") == 1
