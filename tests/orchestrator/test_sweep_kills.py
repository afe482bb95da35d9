"""kill -9 in the middle of a sweep: what resumes ends with the same tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PIPELINE = """
apiVersion: moepipe/v1
name: sweep
stages:
  sweep:
    kind: sweep
    config:
      protocol: domainbed_2020
      datasets: [Debug28]
      algorithms: [ERM, Fish]
      n_trials: 1
      n_hparams: 1
      steps: 60
      checkpoint_freq: 10
      hparams: {batch_size: 4}
      resume_every: 5
  tables: {kind: domainbed_tables, inputs: {runs: "${stages.sweep}"}, config: {title: Debug}}
"""


def moepipe(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MOEPIPE_STORE": str(folder / "store"), "MOEPIPE_DATA": str(folder / "data")}
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def tables(folder: Path) -> dict[str, bytes]:
    """Every table and record below the newest report."""
    found = sorted((folder / "store/artifacts").glob("*/tables.txt"), key=lambda path: path.stat().st_mtime)
    root = found[-1].parent
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def pipeline(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(PIPELINE)
    return path


def test_a_killed_sweep_ends_with_the_same_tables(tmp_path, pipeline):
    finish(moepipe(tmp_path / "whole", "submit", str(pipeline), "--on", "inline"))
    killed = tmp_path / "killed"
    for number in range(3):
        words = ("submit", str(pipeline)) if not number else ("resume", "latest")
        process = moepipe(killed, *words, "--on", "inline")
        _wait_for_new_checkpoint(killed)
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = finish(moepipe(killed, "resume", "latest", "--on", "inline"))
    assert "Resumed at step" in out + _logs(killed)
    assert tables(killed) == tables(tmp_path / "whole")


def _wait_for_new_checkpoint(folder: Path) -> None:
    """Until some run has written a checkpoint that was not there before."""
    before = _checkpoints(folder)
    deadline = time.monotonic() + 240
    while _checkpoints(folder) <= before:
        assert time.monotonic() < deadline, "no checkpoint within four minutes"
        time.sleep(0.05)


def _checkpoints(folder: Path) -> set[str]:
    return {str(path) for path in (folder / "store/scratch").rglob("step-*/state.json")}


def _logs(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "store/runs").rglob("*.log"))
