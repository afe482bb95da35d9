"""The machine misbehaves: full disk, taken port, too small a cluster, MLflow down, two drivers of one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.faults.test_bad_input import GOOD, HEAD, fine
from tests.support.faults import (
    ROOT,
    closed_port,
    environment,
    file_size_limit,
    files_below,
    moepipe,
    small_disk,
    taken_port,
)

BIG = """
stages:
  source:
    kind: numbers
    config: {size_kb: 3000, count: 2}
  end:
    kind: gather
    inputs: {numbers: "${stages.source}"}
"""
SLOW = """
stages:
  source:
    kind: sleepy
    config: {steps: 2000, step_s: 0.05, checkpoint_every: 1, hurry: "HURRY"}
  end:
    kind: gather
    inputs: {numbers: "${stages.source}"}
"""


def pipeline(folder, text, head=HEAD):
    path = folder / "pipeline.yaml"
    path.write_text(head + text)
    return path


def mirrors_ended(store):
    """Wait until nobody but us writes runs of this store to MLflow: a process does on its own after a submit."""
    deadline = time.monotonic() + 120

    def at_work(process):
        words = process.info["cmdline"] or ()
        return "orchestrator.mirror" in words and any(str(store) in word for word in words)

    while any(at_work(process) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def whole(store):
    """Every artifact in the store has all files of its manifest in full size, and no temporary file is left."""
    for manifest in store.rglob("manifest.json"):
        for name, entry in json.loads(manifest.read_text())["files"].items():
            size = entry["size"] if isinstance(entry, dict) else entry[0]
            assert (manifest.parent / name).stat().st_size == size, name
    return files_below(store)


def test_a_full_disk(tmp_path):
    path, store = pipeline(tmp_path, BIG), tmp_path / "disk" / "store"
    with small_disk(tmp_path / "disk", 1) as mounted:
        limit = None if mounted else file_size_limit(1000)
        said = moepipe("submit", path, "--on", "inline", store=store, before=limit)
        fine(said, 5, "No space" if mounted else "File too large")
        assert not [name for name in whole(store) if "filler" in name]
        if mounted:  # room appears, the same run goes on
            subprocess.run(["mount", "-o", "remount,size=32m", str(tmp_path / "disk")], check=True)
        fine(moepipe("resume", "--on", "inline", store=store), 0, "finished")
        assert len([name for name in whole(store) if name.endswith("filler.bin")]) == 2


def test_no_room_for_the_run_record(tmp_path):
    path, store = pipeline(tmp_path, GOOD), tmp_path / "disk" / "store"
    with small_disk(tmp_path / "disk", 1) as mounted:
        if not mounted:
            pytest.skip("needs root on Linux to mount a small disk")
        (tmp_path / "disk" / "filler").write_bytes(bytes(1020 * 1024))
        fine(moepipe("submit", path, "--on", "inline", store=store), 5, "No space")
        (tmp_path / "disk" / "filler").unlink()
        fine(moepipe("submit", path, "--on", "inline", store=store), 0, "finished")


def test_no_room_for_a_miniature(tmp_path):
    data = tmp_path / "disk" / "data"
    with small_disk(tmp_path / "disk", 1) as mounted:
        if not mounted:
            pytest.skip("needs root on Linux to mount a small disk")
        said = moepipe("data", "miniature", "camelyon17", "--data", data, store=tmp_path / "store")
        fine(said, 5, "No space left on device", "MOEPIPE_DATA")
        assert not files_below(data)


def test_a_taken_port(tmp_path):
    fine(moepipe("submit", pipeline(tmp_path, GOOD), "--on", "inline", store=tmp_path / "store"), 0)
    with taken_port() as port:
        said = moepipe("ui", "--port", str(port), store=tmp_path / "store")
    fine(said, 5, f"Port {port}", "moepipe ui --port")


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_a_cluster_that_cannot_fit(command, tmp_path):
    path = pipeline(tmp_path, GOOD)
    said = moepipe(command, path, "--set", "stages.total.resources.cpus=4096", store=tmp_path / "store")
    fine(said, 3, "total", "4096")
    said = moepipe(command, path, "--set", "stages.total.resources.custom={moon: 1}", store=tmp_path / "store")
    fine(said, 3, "total", "moon")


def test_mlflow_is_down_and_comes_back(tmp_path):
    path = pipeline(tmp_path, GOOD, HEAD.replace("tracking: {enabled: false}\n", ""))
    store, down = tmp_path / "store", {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{closed_port()}"}
    said = moepipe(
        "submit", path, "--on", "inline", store=store, extra={**down, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    )
    fine(said, 0, "finished")
    mirrors_ended(store)
    fine(moepipe("track", "sync", store=store, extra={**down, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}), 5, "127.0.0.1")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    said = moepipe("track", "sync", "--uri", uri, "--json", store=store)
    fine(said, 0)
    first = json.loads(said.out)
    assert first["complete"] and first["mlflow_runs"] >= 4  # pipeline, three stages, members
    again = json.loads(moepipe("track", "sync", "--uri", uri, "--json", store=store).out)
    assert again == first


def test_two_drivers_of_one_run(tmp_path):
    # The first driver is at work until it is told to stop; then the rest takes no time.
    hurry = tmp_path / "hurry"
    path, store = pipeline(tmp_path, SLOW.replace("HURRY", str(hurry))), tmp_path / "store"
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.support.launch", "submit", str(path), "--on", "inline"],
        cwd=ROOT,
        env=environment(store),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not list((store / "runs").glob("*/events.jsonl")):
            assert time.monotonic() < end and driver.poll() is None
            time.sleep(0.05)
        run = next((store / "runs").iterdir()).name
        fine(moepipe("resume", run, "--on", "inline", store=store), 7, run, str(driver.pid))
        assert driver.poll() is None
        driver.send_signal(signal.SIGINT)  # and the first one still ends in good order
        assert driver.wait(60) == 130
    finally:
        if driver.poll() is None:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
    hurry.touch()
    said = moepipe("resume", run, "--on", "inline", store=store)
    fine(said, 0, "finished")


def test_two_submits_of_one_pipeline(tmp_path):
    """Two runs that make the same artifacts: the second waits for the first's members and takes them."""
    text = SLOW.replace("steps: 2000", "steps: 40").replace("HURRY", "")
    path, store = pipeline(tmp_path, text), tmp_path / "store"
    command = [sys.executable, "-m", "tests.support.launch", "submit", str(path), "--on", "inline", "--json"]
    drivers = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(store), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [driver.communicate(timeout=120) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    runs = sorted((store / "runs").iterdir())
    artifacts = [json.loads((run / "artifacts.json").read_text()) for run in runs]
    assert len(runs) == 2 and artifacts[0] == artifacts[1]
    finished = [
        line for run in runs for line in (run / "events.jsonl").read_text().splitlines() if '"member-finished"' in line
    ]
    made = [json.loads(line) for line in finished]
    assert sum(not event["data"].get("reused") for event in made if event["node"].startswith("source")) == 1
