"""Kills of the driver and of Ray's own processes, each in a process of its own; digests are those of a calm run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.executors.inline import InlineExecutor
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline

pytestmark = pytest.mark.chaos

STAGES = {"s": {"kind": "sleepy", "config": {"steps": 60, "step_s": 0.05, "checkpoint_every": 2, "count": 2}}}
DRIVER = """
import json, sys
from orchestrator.executors.ray import RayExecutor
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline
folder, stages, victim = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
executor = RayExecutor(num_cpus=2, preload=())
killed = []
def murder(event):
    if victim >= 0 and event.kind == "member-progress" and event.data["done"] >= 12 and not killed:
        killed.append(1)
        executor._ray.processes[victim].kill()
store = Store.open(folder)
run = RunStore(store).create(pipeline(stages))
print(run.id, flush=True)
outcome, _ = go(pipeline(stages), store, executor, listeners=[murder], run=run)
print(json.dumps([outcome.status, dict(outcome.artifacts), len(killed)]), flush=True)
"""


@pytest.fixture
def calm(tmp_path):
    outcome, _ = go(pipeline(STAGES), Store.open(tmp_path / "calm"))
    return dict(outcome.artifacts)


def start(store, victim):
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", DRIVER, store.url, json.dumps(STAGES), str(victim)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("victim", [0, 1], ids=["raylet", "gcs_server"])
def test_a_killed_ray_is_started_again(store, calm, victim):
    out, err = start(store, victim).communicate(timeout=280)
    assert json.loads(out.splitlines()[-1]) == ["finished", calm, 1], err
    (run,) = RunStore(store).list()
    lost = [event.data for event in run.events() if event.kind == "member-failed"]
    assert lost and all(data["line"].startswith("retry: cause=infrastructure") for data in lost)


def processes_of(pid):
    """Ids of all descendants."""
    found, todo = [], [pid]
    while todo:
        children = Path(f"/proc/{(parent := todo.pop())}/task/{parent}/children")
        more = [int(child) for child in children.read_text().split()] if children.exists() else []
        found += more
        todo += more
    return found


def running(pids):
    """Those that still live (a zombie does not)."""
    alive = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        alive += [pid] if state != "Z" else []
    return alive


def test_a_killed_driver_leaves_no_orphans_and_its_run_resumes(store, calm):
    driver = start(store, -1)
    run = RunStore(store).open(driver.stdout.readline().strip())
    deadline = time.monotonic() + 120
    while not any(e.kind == "member-progress" and e.data["done"] >= 12 for e in run.events()):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    family = processes_of(driver.pid)
    assert len(family) > 4
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert run.status == "lost"
    again = RunStore(store).resume(run.id)
    assert again.id == run.id
    outcome, _ = go(pipeline(STAGES), store, InlineExecutor(), run=again)  # at once: orphans may still hold a lock
    assert outcome.artifacts == calm and run.status == "finished"
    deadline = time.monotonic() + 150  # Ray's two agents notice last
    while running(family) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert running(family) == []
