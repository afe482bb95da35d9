"""kill -9 of the command in the middle of a search on Ray: no finished trial is lost, and the same bytes come out."""

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
name: search
tracking: {enabled: false}
stages:
  s:
    kind: search
    config:
      selection: training_domains
      concurrency: 2
      %s
  end: {kind: gather, inputs: {numbers: "${stages.s}"}}
"""
TPE = """
      stage: {kind: score, config: {steps: 40, step_s: 0.05}}
      space: {x: {uniform: [0, 1]}}
      metric: scores.score
      algorithm: tpe
      trials: 8
      startup: 4
      batch: 2
"""
POPULATION = """
      stage: {kind: grow, config: {steps: 60, step_s: 0.03}}
      space: {rate: {loguniform: [0.001, 2]}}
      metric: scores.near
      algorithm: population
      population: {size: 4, interval: 20}
"""


def moepipe(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MOEPIPE_STORE": str(folder / "store")}
    command = [sys.executable, "-m", "tests.support.launch", *words]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate()
    assert process.returncode == 0, out


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "store/runs").glob("*/logs/s/seed=0.log"))


def studies(folder: Path) -> set[str]:
    """Digests of the artifacts that hold a study."""
    return {path.parent.name for path in (folder / "store/artifacts").glob("*/search")}


@pytest.mark.parametrize(("algorithm", "trials"), [(TPE, 3), (POPULATION, 6)], ids=["tpe", "population"])
def test_a_killed_search_loses_no_trial(tmp_path, algorithm, trials):
    path = tmp_path / "search.yaml"
    path.write_text(PIPELINE % algorithm.strip())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(moepipe(whole, "submit", str(path), "--on", "inline"))
    process = moepipe(killed, "submit", str(path))
    deadline = time.monotonic() + 300
    while log(killed).count(" trial ") < trials:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what still runs may finish a trial
    finish(moepipe(killed, "resume", "latest"))
    assert log(killed).count("(from the store)") >= trials
    assert studies(killed) == studies(whole)
