"""MLflow's web page on the store's runs, on loopback only, with direct links to the comparisons worth looking at.

The server is a child process, so this file does not import MLflow. Job execution is off: it would start eight more
processes that this project does not use.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from moe.errors import EnvironmentProblem
from orchestrator.doctor import port_is_free

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_STOP_SECONDS = 15.0


def is_server(uri: str) -> bool:
    """``uri`` names an MLflow server (and not a local database)."""
    return uri.startswith(("http://", "https://"))


def run_link(base: str, experiment: str, run: str) -> str:
    """Page of one MLflow run."""
    return f"{base}/#/experiments/{experiment}/runs/{run}"


def comparison_link(base: str, experiment: str, runs: Sequence[str]) -> str:
    """Page that compares ``runs``: parameters, metrics, parallel coordinates."""
    chosen, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(runs), [experiment]))
    return f"{base}/#/compare-runs?runs={chosen}&experiments={experiments}"


def curves_link(base: str, experiment: str) -> str:
    """Charts of all runs of an experiment."""
    return f"{base}/#/experiments/{experiment}/runs?compareRunsMode=CHART"


def command(uri: str, port: int, artifacts: Path) -> list[str]:
    """The server's command line."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--default-artifact-root", artifacts.absolute().as_uri()),
    ]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Environment of the server: no job runner, no telemetry."""
    return {
        **base,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }


class Server:
    """A running MLflow server; use it as a context manager.

    Args:
        uri: database URI.
        port: port on loopback.
        artifacts: default artifact folder.
        log: file that receives the server's own output.

    Raises:
        EnvironmentProblem: the port is taken, or the server ends before it answers.
    """

    def __init__(self, uri: str, port: int, artifacts: Path, log: Path) -> None:
        if not port_is_free(port, HOST):
            free = next((p for p in range(port + 1, port + 100) if port_is_free(p, HOST)), port + 1)
            raise EnvironmentProblem(
                f"Port {port} on {HOST} is in use by another program.", f"Take another one: moepipe ui --port {free}"
            )
        self.base = f"http://{HOST}:{port}"
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command(uri, port, artifacts),
                env=environment(os.environ),
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout: float = _START_SECONDS) -> None:
        """Block until the server answers (a new database takes it tens of seconds on a small machine)."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EnvironmentProblem(
                    f"The MLflow server ended at once with code {self._process.returncode}.", f"Its log: {self._log}"
                )
            with suppress(OSError), urllib.request.urlopen(f"{self.base}/health", timeout=2):
                return
            time.sleep(0.3)
        raise EnvironmentProblem(f"The MLflow server did not answer within {timeout:.0f} s.", f"Its log: {self._log}")

    def wait(self) -> int:
        """Block until the server ends; returns its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """End the server and its children (we started them as a session of their own)."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
