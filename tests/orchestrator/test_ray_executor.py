import os
import signal
import threading
import time

import pytest

from moe.errors import RunFailed
from orchestrator.executors.ray import RayExecutor
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import DIAMOND, go, pipeline

SLOW = {"kind": "sleepy", "config": {"steps": 4000, "step_s": 0.05, "checkpoint_every": 2}}


@pytest.fixture
def hurry(tmp_path):
    """A file; from when on it is there, the steps of ``slow`` take no time."""
    return tmp_path / "hurry"


@pytest.fixture
def slow(hurry):
    """A stage that works for more than a minute, so that what happens meanwhile finds it at work."""
    return {**SLOW, "config": {**SLOW["config"], "steps": 2000, "hurry": str(hurry)}}


@pytest.fixture
def calm(slow, hurry, tmp_path):
    """What ``slow`` makes when nothing happens to it."""
    hurry.touch()
    outcome, _ = go(pipeline({"s": slow}), Store.open(tmp_path / "calm"))
    hurry.unlink()
    return outcome


@pytest.fixture
def executor(ray_local):
    """One on the session's Ray, which it must leave running."""
    yield RayExecutor()
    assert ray_local.is_initialized()


def test_same_keys_and_digests_as_inline(executor, store, tmp_path):
    stages = {**DIAMOND, "slow": {**SLOW, "config": {"steps": 9}}}
    here, run_here = go(pipeline(stages, seeds=(0, 1)), Store.open(tmp_path / "inline"))
    there, run_there = go(pipeline(stages, seeds=(0, 1)), store, executor)
    assert there.status == "finished" and there.artifacts == here.artifacts
    keys = [
        {event.node: event.data["key"] for event in run.events() if event.kind == "member-finished"}
        for run in (run_here, run_there)
    ]
    assert keys[0] == keys[1]
    pids = {event.data["pid"] for event in run_there.events() if event.kind == "member-started"}
    assert os.getpid() not in pids and len(pids) <= 4 < len(there.artifacts)  # actors are used again
    again, _ = go(pipeline(stages, seeds=(0, 1)), store, RayExecutor())
    assert again.hits == len(again.artifacts)


def test_a_killed_actor_is_retried_from_its_checkpoint_and_gives_the_same_digest(executor, store, slow, calm, hurry):
    pids = []

    def murder(event):
        if event.kind == "member-started":
            pids.append(event.data["pid"])
        if event.kind == "member-progress" and event.data["done"] >= 12 and len(pids) == 1:
            os.kill(pids[0], signal.SIGKILL)
            pids.append(0)
            hurry.touch()

    outcome, run = go(pipeline({"s": slow}), store, executor, listeners=[murder])
    assert outcome.status == "finished" and outcome.artifacts == calm.artifacts
    (failed,) = (event.data for event in run.events() if event.kind == "member-failed")
    assert failed["line"].startswith(
        "retry: cause=infrastructure count=1 limit=3 error=s/seed=0: its worker process died"
    )
    resumed = int(run.log_path("s/seed=0").read_text().split("continues at step ")[1].split()[0])
    assert resumed >= 10


def test_errors_and_logs_cross_the_processes(executor, store):
    stages = {
        "bad": {"kind": "numbers", "config": {"fail_times": 1}},
        "good": {"kind": "sleepy", "config": {"crash_at": 1}},
    }
    outcome, run = go(pipeline(stages), store, executor)
    assert outcome.status == "failed" and type(outcome.failures["bad/seed=0"].error) is RunFailed
    assert outcome.failures["bad/seed=0"].error.message == "bad/seed=0 failed: RuntimeError: item 0 fails on purpose."
    log = run.log_path("bad/seed=0").read_text()
    assert "Traceback (most recent call last)" in log and "fails on purpose" in log
    assert "Traceback" not in outcome.failures["good/seed=0"].error.message


def test_a_process_that_exits_uses_up_its_budget(executor, store):
    config = {"fail_times": 9, "fail_how": "exit"}
    outcome, run = go(
        pipeline({"a": {"kind": "numbers", "config": config, "retry": {"infrastructure": 1}}}), store, executor
    )
    decisions = [event.data["decision"] for event in run.events() if event.kind == "member-failed"]
    assert outcome.status == "failed" and decisions == ["retry", "fail"]
    assert "its worker process died" in outcome.error.message


def test_graceful_stop_then_resume(executor, store, slow, calm, hurry):
    stop = threading.Event()

    def listen(event):
        if event.kind == "member-progress" and event.data["done"] >= 10:
            stop.set()

    outcome, run = go(pipeline({"s": slow}), store, executor, listeners=[listen], stop=stop)
    assert outcome.status == run.status == "interrupted"
    hurry.touch()
    again = RunStore(store).resume(run.id)
    finished, _ = go(pipeline({"s": slow}), store, RayExecutor(), run=again)
    assert finished.artifacts == calm.artifacts and "continues at step" in again.log_path("s/seed=0").read_text()


def test_a_timeout_kills_the_actor(executor, store):
    start = time.monotonic()
    outcome, _ = go(pipeline({"s": {**SLOW, "timeout_s": 1.0}}), store, executor)
    # All steps take 200 s.
    assert outcome.failures["s/seed=0"].cause == "timeout" and time.monotonic() - start < 180


def test_custom_resources_and_capacity_come_from_the_cluster(executor, store):
    capacity = executor.capacity()
    assert capacity is not None and capacity.total["cpus"] == 4.0 and "object_store_memory" not in capacity.total
    executor.close()


def test_a_gang_is_a_ray_train_job(executor, store, tmp_path):
    stages = {"g": {"kind": "gang", "config": {"value": 4}, "resources": {"workers": 2, "cpus": 2}}}
    here, _ = go(pipeline(stages, seeds=(0, 1)), Store.open(tmp_path / "inline"))
    there, run = go(pipeline(stages, seeds=(0, 1)), store, executor)
    assert there.status == "finished" and there.artifacts == here.artifacts
    said = [event.data["message"] for event in run.events() if event.kind == "member-log"]
    assert len(said) == 2 and len(set(said)) == 1, "the ranks stay for the next seed"
    assert list((store.folder / "scratch").iterdir()) == []


def test_a_late_answer_of_the_sink_loses_no_words(ray_local, monkeypatch):
    from orchestrator.executors import ray as module
    from orchestrator.executors.base import Signal

    @ray_local.remote(num_cpus=0)
    class LateSink:
        def __init__(self):
            self.words = ["one", "two"]

        def drain(self):
            time.sleep(0.6)
            words, self.words = self.words, []
            return [Signal("s/seed=0", "log", {"message": word}) for word in words]

    executor, told = RayExecutor(), []
    executor._sink = LateSink.remote()
    monkeypatch.setattr(module, "_ANSWER_S", 0.2)
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        executor._drain(told.append)
    assert [signal.data["message"] for signal in told] == ["one", "two"]
    ray_local.kill(executor._sink)
