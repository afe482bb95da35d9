"""Submission through Ray Jobs to a head of our own, with its dashboard and a token: what another machine sees.

Minutes, since every command is a process with its imports: `pytest -m slow`.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
PROGRAM = f"{sys.executable} -m tests.support.launch"


def free_ports(count):
    """Ports outside those that Ray gives to workers (10002 to 19999)."""
    sockets, found = [], []
    while len(found) < count:
        probe = socket.socket()
        probe.bind(("127.0.0.1", 0))
        sockets.append(probe)
        if not 10000 <= probe.getsockname()[1] <= 19999:
            found.append(probe.getsockname()[1])
    for probe in sockets:
        probe.close()
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """`ray start --head --block` in a session of its own; gives (address, environment of a client, store's folder)."""
    base = tmp_path_factory.mktemp("cluster")
    token = base / "ray_token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOEPIPE_"))}
    client = {
        **clean,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MOEPIPE_REMOTE_PROGRAM": PROGRAM,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    there = {
        **client,
        "MOEPIPE_STORE": str(base / "store"),
        "MOEPIPE_DATA": str(base / "data"),
        "PYTHONPATH": str(ROOT),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    gcs, dashboard, *others = free_ports(8)
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
        "node-manager-port",
        "object-manager-port",
    )
    with tempfile.TemporaryDirectory(prefix="mp-", dir="/tmp") as temporary:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2", "--object-store-memory=100000000"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--{name}={port}" for name, port in zip(names, others, strict=True)),
            f"--temp-dir={temporary}",
        ]
        log = (base / "head.log").open("wb")
        started = subprocess.Popen(command, env=there, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
                    break
                except OSError:
                    assert started.poll() is None, (base / "head.log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{dashboard}", client, base / "store"
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


@pytest.fixture
def moepipe(head, tmp_path):
    """Runs the command line as on a laptop that shares nothing with the cluster but the network."""
    _, environment, _ = head

    def run(*words, code=0, **more):
        command = [sys.executable, "-m", "tests.support.launch", *map(str, words)]
        settings = {**environment, "PYTHONPATH": str(ROOT), "MOEPIPE_STORE": str(tmp_path / "laptop"), **more}
        done = subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def written(tmp_path):
    """Writes a pipeline of toy stages."""

    def write(stages, name="toy"):
        path = tmp_path / f"{name}.yaml"
        document = {"apiVersion": "moepipe/v1", "name": name, "tracking": {"enabled": False}, "stages": stages}
        path.write_text(yaml.safe_dump(document))
        return path

    return write


LONG = {"s": {"kind": "sleepy", "config": {"steps": 600, "step_s": 0.05, "checkpoint_every": 5}}}
SHORT = {"n": {"kind": "numbers", "config": {"count": 2}}}


def wait_for(question, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.3)
    raise AssertionError("it did not happen in time")


def progress_of(store, run):
    """(pid of the driver, steps done) of a run that is there and has begun."""
    events = (
        list(RunStore(Store.open(store)).open(run).events()) if (store / "runs" / run / "run.json").exists() else []
    )
    pids = [event.data["pid"] for event in events if event.kind == "run-started"]
    steps = [event.data["done"] for event in events if event.kind == "member-progress"]
    return (pids[-1], steps[-1]) if pids and steps else None


def test_a_run_is_followed_and_found_again(head, moepipe, written):
    address, _, store = head
    path = written(SHORT)
    done = moepipe("submit", path, "--address", address, "--run", "first")
    assert "first: submitted to" in done.stderr and "n/seed=0" in done.stdout
    runs = RunStore(Store.open(store))
    assert runs.open("first").status == "finished"
    again = moepipe("submit", path, "--cluster", address, "--run", "first", "--json")
    assert "as job first.2" in again.stderr and "n/seed=0" in again.stderr
    assert json.loads(again.stdout) == {
        "run": "first",
        "job": "first.2",
        "status": "SUCCEEDED",
        "exit_code": 0,
        "cluster": address,
    }
    assert "--detach and --any-code are for --cluster" in moepipe("submit", path, "--detach", code=2).stderr
    continued = next(run for run in runs.list() if run.origin == "first")
    assert continued.artifacts() == runs.open("first").artifacts()
    found = json.loads(moepipe("cluster", "jobs", address, "--json").stdout)["jobs"]
    assert {(job["run"], job["status"]) for job in found} >= {("first", "SUCCEEDED")}
    assert "n/seed=0" in moepipe("cluster", "logs", "first", address).stdout
    moepipe("cluster", "logs", "nobody", address, code=4)


def test_exit_codes_pass_through(head, moepipe, written):
    address, _, _ = head
    greedy = written({"n": {"kind": "numbers", "resources": {"cpus": 64}}}, "greedy")
    assert "asks for 64 cpus" in moepipe("submit", greedy, "--address", address, code=3).stdout
    broken = written({"n": {"kind": "numbers", "config": {"count": 1, "fail_times": 1}}}, "broken")
    assert "fails on purpose" in moepipe("submit", broken, "--address", address, code=1).stdout


def test_other_code_on_the_cluster_is_refused(head, written):
    address, client, _ = head
    path = written(SHORT)
    script = f"""
import runpy, sys
from orchestrator import cluster_runs
real = cluster_runs.code_of
cluster_runs.code_of = lambda graph: {{**real(graph), "code.workers/new.py": "ff"}}
sys.argv = ["moepipe", "submit", {str(path)!r}, "--address", {address!r}]
runpy.run_module("tests.support.launch", run_name="__main__")
"""
    settings = {**client, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 5, done.stderr
    assert "other code than the machine that submits: workers/new.py" in done.stdout


def test_a_killed_driver_is_continued_under_the_same_name(head, moepipe, written, tmp_path):
    address, _, store = head
    path = written(LONG)
    calm, _ = go(pipeline(LONG), Store.open(tmp_path / "calm"))
    left = moepipe("submit", path, "--address", address, "--run", "long", "--detach")
    assert "moepipe cluster logs -f long" in left.stderr
    pid, _ = wait_for(lambda: (seen := progress_of(store, "long")) and seen[1] > 60 and seen)
    assert "is running at" in moepipe("submit", path, "--address", address, "--run", "long", "--detach").stderr
    os.kill(pid, signal.SIGKILL)
    assert moepipe("cluster", "logs", "-f", "long", address, code=137).returncode == 137
    done = moepipe("submit", path, "--address", address, "--run", "long")
    assert "as job long.2" in done.stderr
    run = RunStore(Store.open(store)).open("long")
    assert run.status == "finished" and run.artifacts() == calm.artifacts
    kinds = [event.kind for event in run.events()]
    assert kinds.count("run-started") == 2
    resumed = int(re.findall(r"continues at step (\d+)", run.log_path("s/seed=0").read_text())[-1])
    assert resumed >= 60


def test_cancel_stops_at_a_checkpoint_and_the_name_continues(head, moepipe, written):
    address, _, store = head
    path = written(LONG, "other")
    moepipe("submit", path, "--address", address, "--run", "stopped", "--detach", "--set", "seeds=[7]")
    wait_for(lambda: (seen := progress_of(store, "stopped")) and seen[1] > 20)
    assert "was asked to stop" in moepipe("cluster", "cancel", "stopped", address).stdout
    run = RunStore(Store.open(store)).open("stopped")
    wait_for(lambda: run.status == "interrupted")
    # Ray's job ends a moment after the run's record says so.
    wait_for(lambda: moepipe("cluster", "cancel", "stopped", address, code=None).returncode == 4)


def test_a_wrong_token_and_a_silent_address_are_errors_for_people(head, moepipe, written, tmp_path):
    address, _, _ = head
    (tmp_path / "wrong").write_text("b" * 64)
    path = written(SHORT)
    refused = moepipe("submit", path, "--address", address, code=5, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert "No Ray dashboard at" in refused.stderr and "token" in refused.stderr
    (port,) = free_ports(1)
    assert "No Ray dashboard" in moepipe("cluster", "jobs", f"http://127.0.0.1:{port}", code=5).stderr


def test_doctor_asks_every_node(head, moepipe):
    address, _, _ = head
    done = moepipe("doctor", "--cluster", address, "--json", code=None)
    report = json.loads(done.stdout)
    (node,) = report["nodes"]
    checks = {check["name"]: check["status"] for check in node["checks"]}
    assert node["head"] and node["resources"]["CPU"] == 2.0
    assert checks["same code"] == checks["shared store"] == checks["same Python"] == checks["clock"] == "ok"
    table = moepipe("doctor", "--cluster", address, code=None).stdout
    assert f"{node['node']} (head)" in table and "2 CPU" in table
