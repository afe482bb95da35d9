import json
import os
import subprocess
import sys
import time

import pytest

from moe.errors import BusyError, NotFoundError, RunFailed
from orchestrator.events import Event, append_event, read_events
from orchestrator.runs import Run, RunStore
from tests.support.pipelines import DIAMOND, go, pipeline

SPEC = pipeline({"a": {"kind": "numbers"}})
HOLD = """
import sys, time
from pathlib import Path
from orchestrator.runs import Run
with Run(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def runs(store):
    return RunStore(store)


@pytest.fixture
def holder():
    """Starts a process that drives a run."""
    started = []

    def hold(run):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_run_has_everything_to_resume_it(runs):
    run = runs.create(SPEC, options={"on": "inline"})
    assert run.spec() == SPEC and run.info["options"] == {"on": "inline"} and run.origin is None
    assert json.loads((run.path / "environment.json").read_text())["packages"]["ray"]
    assert {runs.open(name).id for name in (run.id, run.id[:-2], "latest", "last")} == {run.id}
    with pytest.raises(NotFoundError, match="no run 'nope'"):
        runs.open("nope")


def test_the_newest_run_comes_first_and_ambiguous_names_are_refused(runs):
    first, second = runs.create(SPEC), runs.create(SPEC)
    assert [run.id for run in runs.list()] == [second.id, first.id]
    with pytest.raises(NotFoundError, match="could be 2 runs"):
        runs.open("toy-")


def test_events_are_appended_and_an_ended_run_is_never_written_again(runs):
    run = runs.create(SPEC)
    run.record("run-started", pid=1)
    run.record("member-log", "a", message="größe\nzwei")
    run.finish("failed", {"a": "0" * 64})
    assert [event.kind for event in run.events()] == ["run-started", "member-log", "run-finished"]
    assert list(run.events())[1].data == {"message": "größe\nzwei"}
    assert run.status == "failed" and run.artifacts() == {"a": "0" * 64}
    before = (run.path / "events.jsonl").read_bytes()
    for again in (run, Run(run.path)):
        with pytest.raises(RunFailed, match="has ended"):
            again.record("member-log", "a", message="late")
    assert (run.path / "events.jsonl").read_bytes() == before


def test_a_torn_last_line_is_tolerated(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, Event(1.0, "run-started"))
    whole = path.read_bytes()
    append_event(path, Event(2.0, "member-started", "a"))
    path.write_bytes(path.read_bytes()[:-9])
    assert [event.time for event, _ in read_events(path)] == [1.0]
    append_event(path, Event(3.0, "member-started", "a"))
    assert [event.time for event, _ in read_events(path)] == [1.0, 3.0]
    assert [event.time for event, _ in read_events(path, len(whole))] == [3.0]


def test_following_goes_on_where_it_stopped(runs):
    run = runs.create(SPEC)
    run.record("run-started")
    ((_, position),) = list(run.follow())
    run.record("member-started", "a")
    assert [event.kind for event, _ in run.follow(position)] == ["member-started"]


def test_status_is_found_at_the_end_of_a_long_record(runs):
    run = runs.create(SPEC)
    for i in range(400):
        append_event(run.path / "events.jsonl", Event(float(i), "member-log", "a", {"message": "x" * 1000}))
    assert run.status == "lost"
    run.finish("finished", {}, note="y" * 100_000)
    assert run.status == "finished"


def test_a_second_process_is_told_who_works_on_the_run(runs, holder):
    run = runs.create(SPEC)
    process = holder(run)
    assert run.status == "running"
    with pytest.raises(BusyError, match=f"process {process.pid} on ") as error, run.lock():
        pass
    assert error.value.exit_code == 7
    with pytest.raises(BusyError):
        runs.resume(run.id)
    with pytest.raises(BusyError):
        go(SPEC, runs_store(runs), run=run)


def runs_store(runs):
    from orchestrator.store import Store

    return Store.open(runs.root.parent)


def test_a_killed_driver_leaves_a_lost_run_that_resumes_under_its_own_id(runs, holder):
    run = runs.create(SPEC)
    run.record("run-started")
    process = holder(run)
    process.kill()
    process.wait()
    assert run.status == "lost"
    assert runs.resume(run.id).id == run.id
    outcome, _ = go(SPEC, runs_store(runs), run=run)
    assert outcome.status == "finished" and run.status == "finished"
    assert [event.kind for event in run.events()].count("run-started") == 2


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_resume_of_an_ended_run_is_a_new_run_that_names_its_origin(runs, status):
    run = runs.create(SPEC, options={"data_root": "d"})
    run.finish(status, {})
    again = runs.resume(run.id)
    assert again.id != run.id and again.origin == run.id and again.spec() == SPEC
    assert again.info["options"] == {"data_root": "d"} and again.status == "lost"


def test_another_host_counts_as_alive_while_its_heart_beats(runs):
    run = runs.create(SPEC)
    owner = run.path / "owner.json"
    owner.write_text(json.dumps({"pid": 1, "host": "elsewhere", "start": "1"}))
    assert run.status == "running"
    os.utime(owner, (time.time() - 600, time.time() - 600))
    assert run.status == "lost"


def test_a_pid_that_was_given_to_another_process_is_not_the_driver(runs):
    import socket

    run = runs.create(SPEC)
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": "1"}
    (run.path / "owner.json").write_text(json.dumps(owner))
    assert run.status == "lost"


def test_the_record_tells_the_whole_run(store):
    outcome, run = go(pipeline(DIAMOND), store)
    events = list(run.events())
    assert events[0].kind == "run-started" and events[-1].data["status"] == "finished"
    finished = {event.node: event.data["digest"] for event in events if event.kind == "member-finished"}
    assert finished == outcome.artifacts == run.artifacts()
    assert run.log_path("numbers/seed=0/item=1").exists()
    with pytest.raises(RunFailed, match="has ended"):
        go(pipeline(DIAMOND), store, run=run)


def test_a_run_that_ends_while_its_status_is_asked_for_is_not_lost(runs, monkeypatch):
    from orchestrator import runs as module

    run = runs.create(SPEC)
    read = module.read_json

    def ends_first(path):
        if path.name == "owner.json":
            append_event(run.path / "events.jsonl", Event(0.0, "run-finished", "", {"status": "finished"}))
        return read(path)

    assert run.status == "lost"
    monkeypatch.setattr(module, "read_json", ends_first)
    assert run.status == "finished"
