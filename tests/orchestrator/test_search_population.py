"""Population-based training and schedules: who goes on from whom, what is found again, what is refused."""

from __future__ import annotations

import json
import threading

import pytest
from ruamel.yaml import YAML

from moe.errors import RunFailed
from orchestrator.executors.ray import RayExecutor
from orchestrator.store import Store
from tests.orchestrator.test_search import done, failure, problems, search, trials
from tests.support.pipelines import go, pipeline
from tests.workers.toy import register
from workers.search_population import Population, PopulationSettings, explore
from workers.search_space import Dimension, Space

pytestmark = pytest.mark.timeout(280)
RATE = {"rate": {"loguniform": [0.001, 2.0]}}


def population(space=None, stage=None, size=6, interval=4, **config):
    """A pipeline of one population of the toy training."""
    own = {name: config.pop(name) for name in ("quantile", "resample", "factors") if name in config}
    block = {"size": size, "interval": interval, **own}
    stage = {"kind": "grow", "config": stage or {}}
    given = {"metric": "scores.near", "algorithm": "population", "population": block, **config}
    stages = search(RATE if space is None else space, **given)
    stages["s"]["config"]["stage"] = stage
    return stages


def scheduled(parts, stage=None):
    stages = search({}, metric="scores.near", algorithm="schedule", schedule=parts)
    stages["s"]["config"]["stage"] = {"kind": "grow", "config": stage or {}}
    return stages


def trace(folder):
    return json.loads((folder / "trace.json").read_text())["trace"]


def generation(rows, number):
    return [row for row in rows if row["segment"]["generation"] == number]


def test_the_worst_go_on_from_the_best_and_the_best_of_the_end_is_given_out(store):
    _, folder, meta, log = done(store, population(figures=True))
    rows = trials(folder)
    assert [len(generation(rows, number)) for number in range(4)] == [6, 6, 6, 0]
    for number in (1, 2):
        before = sorted(generation(rows, number - 1), key=lambda row: -row["objective"][0])
        copies = [row for row in generation(rows, number) if row["segment"]["copied"]]
        assert copies
        for row in copies:  # the lowest third takes over the state of the highest third
            assert row["segment"]["parent"] in {other["number"] for other in before[:2]}
            assert row["segment"]["member"] in {other["segment"]["member"] for other in before[-2:]}
            parent = rows[row["segment"]["parent"]]
            assert row["values"] != parent["values"]
        for row in generation(rows, number):
            if not row["segment"]["copied"]:
                assert row["values"] == rows[row["segment"]["parent"]]["values"]
    last = generation(rows, 2)
    best = max(last, key=lambda row: row["objective"][0])
    assert meta["search"]["best"]["trial"] == best["number"]
    assert meta["scores"]["near"] == best["objective"][0] and "segment" not in meta
    parts = meta["search"]["best"]["schedule"]
    told = [part["values"]["rate"] for part, begin in zip(parts, [0, *(p["until"] for p in parts)], strict=False)
            for _ in range(part["until"] - begin)]  # fmt: skip
    assert trace(folder) == told and len(told) == 12
    for name in ("history", "lineage", "schedule", "parallel", "importance"):
        assert (folder / f"search/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "to update 8, from trial" in log
    assert (folder / "search/schedule.md").read_text().startswith("| updates | rate | trials |")
    assert (folder / "search/trials.md").read_text().splitlines()[2].startswith(f"| {best['number']} | ")


def test_without_copies_every_member_is_an_ordinary_run_to_the_byte(store):
    _, folder, _, _ = done(store, population(quantile=0, interval=5))  # the last segments are shorter
    rows = trials(folder)
    ends = generation(rows, 2)
    assert {row["segment"]["until"] for row in ends} == {12} and len(ends) == 6
    for row in ends:
        ordinary, _ = go(pipeline({"s": {"kind": "grow", "config": row["values"]}}), store)
        assert ordinary.hits == 0 and ordinary.artifacts["s/seed=0"] == row["artifacts"][0]


def test_a_population_of_the_train_stage_without_copies_is_training(store):
    register()
    training = {"batch_size": 16, "steps": 20, "lr": 0.01, "optimizer": "adamw", "schedule": "onecycle"}
    config = {"backbone": {"name": "tiny_cnn", "width": 2}, "training": training}
    data = {"data": {"kind": "prepare", "config": {"dataset": "toy", "options": {"size": 8}}}}
    block = {"size": 2, "interval": 7, "quantile": 0}
    space = {"training.lr": {"loguniform": [0.001, 0.1]}, "training.weight_decay": {"choice": [0.0, 0.1]}}
    own = {"stage": {"kind": "train", "config": config}, "space": space, "metric": "scores.accuracy"}
    own |= {"selection": "validation_domains", "algorithm": "population", "population": block, "figures": False}
    wired = {"inputs": {"data": "${stages.data}"}}
    _, folder, _, _ = done(store, {**data, "s": {"kind": "search", "config": own, **wired}})
    rows = trials(folder)
    assert len(rows) == 6 and rows[0]["values"] == {"training.lr": 0.01, "training.weight_decay": 0.0}
    for row in generation(rows, 2):
        chosen = {name.partition(".")[2]: value for name, value in row["values"].items()}
        ordinary = {"kind": "train", "config": {**config, "training": {**training, **chosen}}, **wired}
        outcome, _ = go(pipeline({**data, "s": ordinary}), store)
        assert outcome.hits == 1 and outcome.artifacts["s/seed=0"] == row["artifacts"][0]


def test_the_schedule_gives_the_winner_again(store, tmp_path):
    _, folder, meta, _ = done(store, population())
    best = YAML(typ="safe").load((folder / "search/best.yaml").read_text())
    assert best["kind"] == "search" and best["config"]["algorithm"] == "schedule"
    best["config"]["figures"] = False
    _, again, second, _ = done(Store.open(tmp_path / "other"), {"s": best})
    assert trace(again) == trace(folder) and (again / "trace.json").read_bytes() == (folder / "trace.json").read_bytes()
    assert second["scores"] == meta["scores"]
    assert second["search"]["best"]["schedule"][-1]["until"] == 12


def test_a_schedule_changes_fields_at_the_given_updates(store):
    parts = [{"until": 3, "values": {"rate": 0.5}}, {"until": 9, "values": {"rate": 0.25}}, {"values": {"rate": 0.125}}]
    _, folder, _, _ = done(store, scheduled(parts))
    assert trace(folder) == [0.5] * 3 + [0.25] * 6 + [0.125] * 3
    error = failure(store, scheduled(parts[:2]))
    assert isinstance(error, RunFailed) and "None of them came to the end of training" in error.message


def test_a_larger_population_finds_what_was_there(store):
    done(store, population(size=4))
    _, _, _, log = done(store, population(size=6))
    assert log.count("(from the store)") >= 4  # the first four of generation 0 at least
    _, _, _, log = done(store, population(size=6, quantile=0.5))
    assert log.count("(from the store)") >= 6
    _, folder, _, _ = done(store, search({"rate": {"choice": [0.1, 0.2]}}, metric="scores.near", algorithm="random",
                                         trials=2, stage={"kind": "grow"}))  # fmt: skip
    assert not any(row["source"] == "earlier" for row in trials(folder))  # a segment is no whole trial


def test_a_population_that_was_cut_off_ends_with_the_same_bytes(store, tmp_path):
    stages = population(stage={"step_s": 0.001})
    whole, _, _, _ = done(Store.open(tmp_path / "whole"), stages)
    stop = threading.Event()

    def interrupt(event):
        if event.kind == "member-log" and event.data["message"].startswith("trial 8:"):
            stop.set()

    cut, _ = go(pipeline(stages), store, listeners=[interrupt], stop=stop)
    assert cut.status == "interrupted"
    again, _, _, log = done(store, stages)
    assert again.artifacts == whole.artifacts and "9 from the store, 9 run now" in log


def test_members_that_fail_are_replaced(store):
    _, folder, meta, log = done(store, population(stage={"fail_above": 0.3}))
    rows = trials(folder)
    failed = [row for row in generation(rows, 0) if row["state"] == "failed"]
    assert failed and meta["search"]["trials"]["failed"] >= 1 and "is too much" in log
    for row in failed:
        (after,) = (r for r in generation(rows, 1) if r["segment"]["member"] == row["segment"]["member"])
        assert after["segment"]["copied"]
    _, folder, _, _ = done(store, population(stage={"fail_above": 0.3}, quantile=0))
    assert len(generation(trials(folder), 2)) == 6 - len(failed)  # nobody is copied


def test_a_population_in_which_all_fail_is_an_error(store):
    error = failure(store, population(stage={"fail_above": 1e-6}))
    assert isinstance(error, RunFailed) and "All of the first 5 trials failed" in error.message


def test_small_scores_can_be_best(store):
    _, folder, meta, _ = done(store, population(mode="min"))
    last = generation(trials(folder), 2)
    assert meta["search"]["best"]["objective"][0] == min(row["objective"][0] for row in last)


def test_same_bytes_on_ray_and_inline(ray_local, store, tmp_path):
    stages = population(stage={"fail_above": 1.0})
    here, _, _, _ = done(Store.open(tmp_path / "inline"), stages)
    there, _, _, log = done(store, stages, executor=RayExecutor())
    assert there.artifacts == here.artifacts and "0 from the store, 18 run now" in log
    _, _, _, log = done(store, population(stage={"fail_above": 1.0}, size=7), executor=RayExecutor())
    assert log.count("(from the store)") >= 6


@pytest.mark.slow
def test_a_segment_whose_process_dies_goes_on_from_its_checkpoint(ray_local, store, tmp_path):
    stages = population(stage={"die_at": 6}, size=2)
    outcome, run = go(pipeline(stages), store, RayExecutor())
    assert outcome.status == "finished"
    logs = [path.read_text() for path in (run.path / "logs/s/seed=0").glob("trial=*.log")]
    assert len(logs) == 6 and sum("continues at step 6" in text for text in logs) == 2


# ---- explore ---------------------------------------------------------------------------------------------------------

SPACE = Space(
    {
        "lr": Dimension(loguniform=[1e-4, 1e-1]),
        "half": Dimension(uniform=[0, 1], step=0.5),
        "count": Dimension(integer=[1, 9]),
        "form": Dimension(choice=["a", "b", "c"]),
        "bend": Dimension(uniform=[1, 2], when={"form": "b"}),
    }
)


def settings(**values):
    return PopulationSettings(size=4, interval=1, **values)


def test_numbers_change_by_the_factors_and_choices_to_a_neighbour():
    values = {"lr": 0.01, "half": 0.5, "count": 1, "form": "b", "bend": 1.5}
    up = explore(SPACE, values, settings(resample=0), lambda name: 0.9)
    down = explore(SPACE, values, settings(resample=0), lambda name: 0.1)
    assert up == {"lr": 0.012, "half": 1.0, "count": 2, "form": "c"}
    assert down == {"lr": 0.008, "half": 0.0, "count": 1, "form": "a"}
    stays = explore(SPACE, {**up, "form": "a", "lr": 0.1}, settings(resample=0), lambda name: 0.9)
    assert stays["form"] == "b" and stays["lr"] == 0.1 and 1 <= stays["bend"] <= 2  # drawn: it was not there
    fresh = explore(SPACE, values, settings(resample=1), lambda name: 0.5)
    assert fresh["form"] == "b" and fresh["lr"] == pytest.approx(10**-2.5, rel=1e-4)


@pytest.mark.parametrize("resample", [0.0, 0.3, 1.0])
def test_what_is_explored_lies_in_the_space(resample):
    proposer = Population(SPACE, PopulationSettings(size=9, interval=2, resample=resample), "max", 3)
    for _ in range(6):
        number = 0
        while isinstance(point := proposer.ask(), dict):
            number = len(proposer.steps) - 1
            assert SPACE.contains({k: v for k, v in point.items() if not k.startswith("~")})
        assert point == "wait"
        for step in [step for step in proposer.steps if step.objective is None]:
            proposer.made(step.number, f"{step.number:064d}", 100)
            proposer.tell(step.number, [float(step.member)])
        now = [step for step in proposer.steps if step.number > number]
        assert [step.member for step in now if step.copied] == [0, 1, 2]
        pairs = [(step.parent, json.dumps(step.values)) for step in now]
        assert len(set(pairs)) == 9 or resample == 0


def test_a_member_that_ends_early_takes_part_no_longer():
    proposer = Population(SPACE, PopulationSettings(size=4, interval=2, quantile=0.5), "max", 0)
    while isinstance(proposer.ask(), dict):
        pass
    for step in list(proposer.steps):
        proposer.made(step.number, "a" * 64, 0 if step.member == 3 else 10)
        proposer.tell(step.number, [float(step.member)])
    now = [step for step in proposer.steps if step.generation == 1]
    assert [step.member for step in now] == [0, 1, 2]  # 3 is at its end, whatever patience or an average said
    assert {step.parent for step in now if step.copied} <= {1, 2} and now[0].copied
    assert proposer.ask()["~until"] == 4


def test_an_interval_without_a_selection_is_told(store):
    _, _, _, log = done(store, population(interval=40, size=3))
    assert "nothing was changed: lower the interval" in log and "3 trials" in log


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD = """
apiVersion: moepipe/v1
name: bad
stages:
  s:
    kind: search
    config:
      stage: {kind: grow, config: {steps: 12}}
      space:
        rate: {uniform: [0.1, 1]}
      metric: scores.near
      selection: training_domains
      algorithm: population
      population: {size: 4, interval: 3}
"""


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("rate: {uniform: [0.1, 1]}", "width: {int: [1, 3]}", 10,
         "'width' cannot change while training goes on. Fields of 'grow' that can: rate, form, step_s."),
        ("rate: {uniform: [0.1, 1]}", "ratee: {uniform: [0.1, 1]}", 10, "has no field 'ratee'. Did you mean 'rate'?"),
        ("kind: grow", "kind: score", 13, "stage kind 'score' cannot go on from the training state of another trial"),
        ("population: {size: 4, interval: 3}", "trials: 4", 8, "block `population` belong together"),
        ("algorithm: population", "algorithm: random\n      trials: 3", 8, "block `population` belong together"),
        ("algorithm: population", "scheduler: pbt", 8, "is written `algorithm: population`"),
        ("algorithm: population", "algorithm: population\n      trials: 3", 8, "leave out trials"),
        ("algorithm: population", "algorithm: population\n      scheduler: asha", 8, "set scheduler: none"),
        ("algorithm: population", "algorithm: population\n      seeds: 2", 8, "with seeds: 1"),
        ("metric: scores.near", "metric: [scores.near, value]", 8, "one metric"),
        ("space:\n        rate: {uniform: [0.1, 1]}", "space: {}", 8, "a population needs a space"),
        ("size: 4", "size: 0", 14, "at least 1"),
        ("size: 4", "quantile: 0.6, size: 4", 14, "at most 0.5"),
        ("interval: 3", "intervall: 3", 14, "Did you mean 'interval'?"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_line_and_hint(tmp_path, before, after, line, words):
    assert before in BAD
    found = problems(tmp_path, BAD.replace(before, after, 1))
    assert any(text.startswith(f"{line}:") and words in text for text in found), found


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("[{until: 4, values: {rate: 0.5}}, {until: 4, values: {rate: 0.1}}, {values: {}}]", "above the one before"),
        ("[{values: {rate: 0.5}}, {values: {rate: 0.1}}]", "needs an `until`"),
        ("[{until: 4, values: {width: 2}}, {values: {}}]", "'width' cannot change while training goes on"),
        ("[{until: 4, values: {rate: -2}}, {values: {}}]", "rate: expected a value greater than 0, found -2"),
    ],
)
def test_mistakes_in_a_schedule(tmp_path, schedule, words):
    text = BAD.replace("population: {size: 4, interval: 3}", f"schedule: {schedule}")
    text = text.replace("algorithm: population", "algorithm: schedule")
    found = problems(tmp_path, text.replace("      space:\n        rate: {uniform: [0.1, 1]}\n", ""))
    assert any(words in told for told in found), found
