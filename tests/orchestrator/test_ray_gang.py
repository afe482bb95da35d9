"""Ranks that die, fail or are stopped inside a Ray Train job. Each start of a gang takes some ten seconds."""

import threading

import pytest

import tests.support.crashing_gang  # noqa: F401
from orchestrator.executors.ray import RayExecutor
from orchestrator.runs import RunStore
from tests.support.pipelines import go, pipeline

pytestmark = pytest.mark.slow


def gang(how):
    return pipeline({"g": {"kind": "crashing_gang", "config": {"how": how}, "resources": {"workers": 2}}})


def test_a_killed_rank_is_charged_to_infrastructure_and_the_gang_goes_on(ray_local, store):
    outcome, run = go(gang("sigkill"), store, RayExecutor())
    assert outcome.status == "finished"
    assert store.artifact(outcome.artifacts["g/seed=0"]).meta == {"value": 3}
    (failed,) = (event.data for event in run.events() if event.kind == "member-failed")
    assert failed["cause"] == "infrastructure" and failed["decision"] == "retry" and "a rank died" in failed["error"]
    said = [event.data["message"] for event in run.events() if event.kind == "member-log"]
    assert said == ["step 1", "step 2", "step 3"]


def test_an_exception_of_a_rank_is_the_error_of_the_member(ray_local, store):
    outcome, run = go(gang("error"), store, RayExecutor())
    assert outcome.status == "failed"
    assert outcome.error.message == "g/seed=0 failed: ValueError: rank 1 is unhappy."
    assert outcome.failures["g/seed=0"].cause == "user" and "Traceback" in run.log_path("g/seed=0").read_text()


def test_a_stop_reaches_the_ranks(ray_local, store):
    stop = threading.Event()

    def listen(event):
        if event.kind == "member-progress":
            stop.set()

    outcome, run = go(gang("interrupt"), store, RayExecutor(), listeners=[listen], stop=stop)
    assert outcome.status == "interrupted"
    finished, again = go(gang("interrupt"), store, RayExecutor(), run=RunStore(store).resume(run.id))
    assert finished.status == "finished" and again.origin == run.id
