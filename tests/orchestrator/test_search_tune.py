"""The search stage on Ray Tune: same results as one after the other, deaths, early stops, stops and resumes."""

from __future__ import annotations

import json
import threading
import time

import pytest

from orchestrator.executors.ray import RayExecutor
from orchestrator.store import Store
from tests.orchestrator.test_search import done, search, trials
from tests.support.pipelines import go, pipeline

pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def executor(ray_local):
    yield RayExecutor()
    assert ray_local.is_initialized()


def test_same_bytes_as_inline_whatever_runs_side_by_side(executor, store, tmp_path):
    space = {"x": {"uniform": [0, 1]}, "form": {"choice": ["plain", "bent"]}}
    config = {"algorithm": "tpe", "trials": 8, "startup": 4, "batch": 4, "stage": {"config": {"fail_above": 0.8}}}
    here, _, _, _ = done(Store.open(tmp_path / "inline"), search(space, **config))
    there, _, _, log = done(store, search(space, **config), executor=executor)
    assert there.artifacts == here.artifacts
    assert "0 from the store, 8 run now" in log and "is too much" in log


def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(executor, store):
    stages = search(stage={"config": {"steps": 6, "die_at": 4}})
    outcome, run = go(pipeline(stages), store, executor)
    assert outcome.status == "finished"
    meta = store.artifact(outcome.artifacts["s/seed=0"]).meta
    assert meta["search"]["trials"] == {"done": 3, "failed": 0, "stopped": 0}
    logs = sorted((run.path / "logs/s/seed=0").glob("trial=*.log"))
    assert len(logs) == 3 and all("continues at step 4" in path.read_text() for path in logs)


@pytest.mark.slow
def test_a_trial_that_stands_still_is_tried_again(executor, store, monkeypatch):
    monkeypatch.setenv("MOEPIPE_STALL_S", "8")
    stages = search({"x": {"choice": [0.2, 0.4]}}, stage={"config": {"steps": 6, "freeze_at": 4}})
    outcome, run = go(pipeline(stages), store, executor)
    assert outcome.status == "finished"
    assert store.artifact(outcome.artifacts["s/seed=0"]).meta["search"]["trials"]["done"] == 2
    text = run.log_path("s/seed=0").read_text()
    assert text.count("gave no sign of life for") == 2 and "its process is ended" in text
    logs = sorted((run.path / "logs/s/seed=0").glob("trial=*.log"))
    assert len(logs) == 2 and all("continues at step 4" in path.read_text() for path in logs)


def test_a_stage_without_retries_gives_its_trials_none(executor, store):
    stages = search({"x": {"choice": [0.2]}}, stage={"config": {"steps": 3, "die_at": 1}})
    stages["s"]["retry"] = {"infrastructure": 0}
    outcome, run = go(pipeline(stages), store, executor)
    assert outcome.status == "failed"
    assert "its process died once" in run.log_path("s/seed=0").read_text() + str(outcome.error)


def test_asha_stops_bad_trials_early_and_a_repetition_runs_nothing(executor, store):
    space = {"x": {"choice": [0.3, 0.35, 0.9, 0.95, 1.0, 0.85]}}
    config = {"scheduler": "asha", "grace": 2, "reduction": 2, "concurrency": 1}
    steps = {"config": {"steps": 8, "step_s": 0.02}}
    stages = search(space, stage=steps, **config)
    _, folder, meta, log = done(store, stages, executor=executor)
    assert meta["search"]["best"]["values"] == {"x": 0.3}
    stopped = [trial for trial in trials(folder) if trial["state"] == "stopped"]
    assert len(stopped) >= 3 and all(trial["steps"] < 8 and trial["objective"] is None for trial in stopped)
    assert f"{len(stopped)} stopped early" in log
    done_ones = [trial for trial in trials(folder) if trial["state"] == "done"]
    assert done_ones[0]["curve"][-1][0] == 8
    wider = {"x": {"choice": [*space["x"]["choice"], 0.99]}}
    _, folder, _, log = done(store, search(wider, stage=steps, **config), executor=RayExecutor())
    again = {trial["values"]["x"]: trial["state"] for trial in trials(folder)}
    assert all(again[trial["values"]["x"]] == "stopped" for trial in stopped)


def test_a_curve_that_no_trial_reports_is_an_error(executor, store):
    config = {"scheduler": "asha", "curve": "val/scoer", "concurrency": 1}
    outcome, _ = go(pipeline(search(stage={"config": {"steps": 2}}, **config)), store, executor)
    assert outcome.status == "failed"
    assert "looks at 'val/scoer', which no trial reports while it runs. It reports val/score." in str(outcome.error)


@pytest.mark.slow
def test_a_search_that_is_stopped_keeps_its_trials(executor, store, tmp_path):
    stages = search({"x": {"choice": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}}, stage={"config": {"steps": 40, "step_s": 0.05}})
    stages["s"]["config"]["concurrency"] = 2
    whole, _, _, _ = done(Store.open(tmp_path / "whole"), stages)
    stop = threading.Event()

    def interrupt(event):
        if event.kind == "member-log" and event.data["message"].startswith("trial 1:"):
            threading.Timer(1.0, stop.set).start()

    start = time.monotonic()
    cut, _ = go(pipeline(stages), store, executor, listeners=[interrupt], stop=stop)
    assert cut.status == "interrupted" and time.monotonic() - start < 200
    again, _, _, log = done(store, stages, executor=RayExecutor())
    assert again.artifacts == whole.artifacts
    assert int(log.rpartition(" trials: ")[2].split()[0]) >= 2  # found in the store
    trial = (log, *(path.read_text() for path in store.folder.glob("runs/*/logs/s/seed=0/trial=*.log")))
    assert any("continues at step" in text for text in trial)


@pytest.mark.slow
def test_concurrency_is_what_fits(executor, store):
    stages = search({"x": {"int": [0, 1]}, "cost": {"int": [1, 4]}}, stage={"config": {"steps": 10, "step_s": 0.1}})
    stages["s"]["resources"] = {"cpus": 2}  # of four
    _, run = go(pipeline(stages), store, executor)
    (started,) = (event for event in run.events() if event.kind == "member-started")
    assert started.data["resources"] == {"cpus": 2.0}
    lines = [line.split()[0] for line in run.log_path("s/seed=0").read_text().splitlines()]
    assert len(lines) == 9


def test_only_who_still_does_a_silent_trial_is_ended(ray_local):
    from orchestrator.executors.base import Signal
    from orchestrator.executors.ray_actors import RemoteSink
    from orchestrator.executors.tune_watch import TrialLives

    @ray_local.remote(num_cpus=0)
    class Runner:
        def here(self):
            return True

    def dead(actor):
        try:
            return not ray_local.get(actor.here.remote())
        except ray_local.exceptions.RayActorError:
            return True

    def look_until(condition):
        """More than once: after a moment in which this process stood still, everybody gets a new start."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)
            lives.look()

    def beat(trial, who):
        signal = Signal(f"s/seed=0/trial={trial}/run=1", "beat", {"who": who, "host": "n"})
        ray_local.get(sink.push.remote([signal]))

    sink, runner, told = RemoteSink.remote(), Runner.remote(), []
    lives = TrialLives(sink, 0.5, told.append)
    take = lambda trial: ray_local.get(sink.takes.remote(str(trial), runner._actor_id.hex(), runner))  # noqa: E731
    try:
        for trial in (3, 5):  # a rank of theirs died without a farewell
            take(trial)
            beat(trial, "rank 1")
        lives.look()
        lives.ended(5, died=False)
        take(7)
        look_until(lambda: not lives._lives.nodes())  # the rank of trial 3 counts as lost
        assert ray_local.get(runner.here.remote()) and told == []
        beat(7, "its process")
        look_until(lambda: told)
        assert len(told) == 1 and told[0].startswith("trial 7: its process gave no sign of life")
        look_until(lambda: dead(runner))  # a kill takes effect a moment after it was sent
    finally:
        ray_local.kill(sink)


def test_what_is_missing_is_named(ray_local):
    from orchestrator.executors.tune import missing
    from orchestrator.spec import Resources

    assert missing(Resources(gpus=2)) == "it asks for 2 gpus (free: 0)"
    assert missing(Resources(cpus=3, workers=2)).startswith("it asks for 6 cpus (free: ")
    assert "not on one machine" in missing(Resources(cpus=0))


def test_trials_without_a_place_for_long_are_an_error(ray_local, monkeypatch):
    from orchestrator.executors import tune
    from orchestrator.spec import Resources

    class Trial:
        status = "PENDING"

    class Context:
        class task:  # noqa: N801
            node, resources, gang = "s/seed=0", Resources(gpus=1), False

        def check(self):
            return None

    class Conductor:
        problem = None

        class search:  # noqa: N801
            context = Context()

    watch = tune._Watch(Conductor(), None)
    watch.on_step_end(0, [Trial()])
    monkeypatch.setattr(tune, "PENDING_S", -1.0)
    watch._next = 0.0
    with pytest.raises(tune.InfeasibleError, match=r"no trial found a place .* it asks for 1 gpus \(free: 0\)"):
        watch.on_step_end(1, [Trial()])


def free_cpus(ray, count, seconds=60):
    """Wait until Ray has ``count`` logical CPUs to give away."""
    end = time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) < count and time.monotonic() < end:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0)


@pytest.mark.slow
def test_trials_that_are_gangs_themselves(executor, store, ray_local):
    free = free_cpus(ray_local, 4)
    stages = search({"value": {"choice": [1, 5]}}, metric="value", stage={"kind": "gang"})
    stages["s"]["resources"] = {"workers": 2, "cpus": 1}
    _, folder, meta, _ = done(store, stages, executor=executor)
    assert meta["value"] == 6 and json.loads((folder / "search/best.json").read_text())["value"] == 5
    assert free_cpus(ray_local, free) == free  # what the ranks held is given back in a Ray that goes on


@pytest.mark.slow
def test_a_gang_whose_trial_dies_leaves_its_place_to_the_next(executor, store, ray_local):
    space = {"value": {"choice": [1, 5, 7]}}
    stages = search(space, metric="value", stage={"kind": "gang", "config": {"die": True}})
    stages["s"]["config"]["concurrency"] = 1
    stages["s"]["resources"] = {"workers": 3, "cpus": 1}  # of four: two gangs have no room
    _, _, meta, _ = done(store, stages, executor=executor)
    assert meta["value"] == 8 and meta["search"]["trials"]["done"] == 3
    assert free_cpus(ray_local, 3) >= 3
