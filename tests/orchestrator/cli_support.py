"""What the tests of the command line share: a working directory, a runner that checks exit codes, a finished run."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tests.support.toy_stages  # noqa: F401
from orchestrator.cli import app

PIPELINE = """\
apiVersion: moepipe/v1
name: toy
seeds: [0, 1]
tracking: {enabled: false}
stages:
  numbers:
    kind: numbers
    config: {count: 2}
  slow:
    kind: sleepy
    inputs: {start: "${stages.numbers}"}
    config: {steps: 4}
  report:
    kind: gather
    inputs: {numbers: "${stages.slow}"}
"""
INLINE = ("--on", "inline")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with one pipeline."""
    for name in ("MOEPIPE_STORE", "MOEPIPE_DATA", "MOEPIPE_PROFILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(PIPELINE)
    return tmp_path


def call(*arguments, code=0):
    """Run a command and check its exit code; returns the result."""
    result = CliRunner().invoke(app, [str(item) for item in arguments], prog_name="moepipe")
    assert result.exit_code == code, f"{arguments}: {result.output}\n{result.exception!r}"
    assert "Traceback" not in result.stderr
    return result


def document(*arguments, code=0):
    """Run a command with --json and read the one document on stdout."""
    return json.loads(call(*arguments, "--json", code=code).stdout)


@pytest.fixture
def done(folder):
    """A finished run."""
    return document("submit", "toy.yaml", *INLINE, "--quiet")
