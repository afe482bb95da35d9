"""The process beside a run that writes it to MLflow, seen from both sides.

The driver starts it and looks at its state file; the process follows the event file until the run has ended or the
driver is gone. It runs at low priority, and nothing waits for it but the last seconds of a run's first submit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from moe.errors import BusyError, MoepipeError
from orchestrator.runs import ENDED, Run, RunStore
from orchestrator.store import Store
from orchestrator.tracking_state import TrackingState, state_path

_POLL_S = 1.0
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0
_LAST_ATTEMPTS = 2
_ALONE_S = 8.0
_ENDING_S = 1.5


@dataclass
class Mirror:
    """The driver's handle on the process.

    Attributes:
        run: the run that is mirrored.
        store: its store.
        uri: where to.
    """

    run: Run
    store: Store
    uri: str
    _process: subprocess.Popen[bytes] | None = None
    _warned: bool = False

    def start(self) -> None:
        """Start the process; returns at once."""
        log = state_path(self.store, self.run.id).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        options = {
            "run": self.run.id,
            "store": self.store.url,
            "uri": self.uri,
            "kinds": _registered_kinds(self.run),
        }
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.mirror", json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,  # the terminal's Ctrl-C is for the driver; this one still has an end to write
            )

    @property
    def state(self) -> TrackingState:
        """How far it is."""
        return TrackingState.load(state_path(self.store, self.run.id), self.uri)

    def problem(self) -> str:
        """What is wrong, said once; empty when nothing is, or when it was said before."""
        error = self.state.error
        if not error and self._process is not None and self._process.poll() not in (None, 0):
            error = f"the MLflow process ended with code {self._process.returncode}"
        if not error or self._warned:
            return ""
        self._warned = True
        return f"{error.rstrip('.')}. The run goes on; afterwards: moepipe track sync {self.run.id}"

    def wait(self, timeout: float) -> TrackingState:
        """Give the process at most ``timeout`` seconds to write the run's end; it goes on by itself afterwards."""
        if self._process is not None:
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline and self._process.poll() is None and not self.state.error:
                time.sleep(0.05)
        return self.state


def _registered_kinds(run: Run) -> dict[str, str]:
    """Stage kinds of the run with their modules: the process must see the same, also those registered by hand."""
    from orchestrator.stages.base import STAGES

    return {stage.kind: STAGES.module_name(stage.kind) for stage in run.spec().stages.values()}


def sync(run: Run, store: Store, uri: str) -> TrackingState:
    """Write what is missing in MLflow, now.

    Raises:
        EnvironmentProblem: the server does not answer.
        BusyError: another process is writing this run.
    """
    from orchestrator.graph import build_graph
    from orchestrator.projection import open_projection

    path = state_path(store, run.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A process that has just given up needs a moment to end.
        with FileLock(f"{path}.lock", timeout=_ENDING_S):
            projection = open_projection(run, build_graph(run.spec()), store, TrackingState.load(path, uri))
            projection.advance()
            projection.state.error = ""
            projection.state.save(path)
            return projection.state
    except Timeout:
        raise BusyError(f"Another process is writing run {run.id} to MLflow.", "Wait for it, then try again.") from None


def follow(run: Run, store: Store, uri: str) -> None:
    """Keep MLflow up to date until the run has ended, or its driver has been gone for some seconds.

    A server that fails is tried again with growing pauses; when the run is over, twice more, then the state says what
    is missing.
    """
    from orchestrator.graph import build_graph
    from orchestrator.projection import Projection, open_projection

    path = state_path(store, run.id)
    graph = build_graph(run.spec())
    projection: Projection | None = None
    pause, last_attempts, alone_since = _FIRST_PAUSE_S, _LAST_ATTEMPTS, time.monotonic()
    # When the process of a killed driver still follows the run that is resumed now, it may as well go on.
    with suppress(Timeout), FileLock(f"{path}.lock", timeout=2 * _ALONE_S):
        while True:
            status = run.status
            if status == "running":
                alone_since = time.monotonic()
            over = status in ENDED or time.monotonic() - alone_since > _ALONE_S
            try:
                if projection is None:
                    projection = open_projection(run, graph, store, TrackingState.load(path, uri))
                projection.advance()
                if projection.state.error:
                    projection.state.error = ""
                    projection.state.save(path)
                if projection.state.complete or over:
                    return
                pause = _FIRST_PAUSE_S
                time.sleep(_POLL_S)
            except Exception as error:  # whatever MLflow, its database or its server come up with
                _say(path, uri, error)
                projection = None
                last_attempts -= over
                if last_attempts <= 0:
                    return
                _sleep(pause, run)
                pause = min(2 * pause, _LONGEST_PAUSE_S)


def _sleep(seconds: float, run: Run) -> None:
    """Sleep, but not past the end of the run."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and run.status == "running":
        time.sleep(0.5)


def _say(path: Path, uri: str, error: Exception) -> None:
    state = TrackingState.load(path, uri)
    message = error.message if isinstance(error, MoepipeError) else f"MLflow at {uri}: {type(error).__name__}: {error}"
    state.error = message.splitlines()[0][:500]
    state.save(path)
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {message}\n")


def main() -> None:
    """Entry point of the process: one JSON argument, made by :meth:`Mirror.start`."""
    from orchestrator.stages.base import STAGES

    options = json.loads(sys.argv[1])
    with suppress(OSError):
        os.nice(10)
    for kind, module in options["kinds"].items():
        STAGES.add(kind, module)
    store = Store.open(options["store"])
    follow(RunStore(store).open(options["run"]), store, options["uri"])


if __name__ == "__main__":
    main()
