"""Driving a run: executor, display, stop signals, the MLflow process; what submit and resume share."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

from orchestrator.events import Event
from orchestrator.executors.base import Executor
from orchestrator.graph import Graph
from orchestrator.live import Display
from orchestrator.mirror import Mirror
from orchestrator.outcome import Outcome
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.tracking_state import TrackingState, tracking_uri

_WATCH_S = 0.5
_WAIT_AFTER_WORK_S = 10.0
_WAIT_AFTER_HITS_S = 1.0


@dataclass(frozen=True)
class Driven:
    """What came out of driving a run.

    Attributes:
        outcome: of the scheduler.
        mirror: the process that writes to MLflow; None when the pipeline does not track.
    """

    outcome: Outcome
    mirror: Mirror | None

    def tracking(self) -> TrackingState | None:
        """How far MLflow is, after a moment for the run's end. After a run of hits nobody waits."""
        if self.mirror is None:
            return None
        worked = self.outcome.hits < len(self.outcome.artifacts)
        return self.mirror.wait(_WAIT_AFTER_WORK_S if worked else _WAIT_AFTER_HITS_S)


def make_executor(where: str, store: Store) -> Executor:
    """The executor for ``--on``: ``inline``, ``ray`` (a cluster of our own on this machine) or a cluster's address."""
    if where == "inline":
        from orchestrator.executors.inline import InlineExecutor

        return InlineExecutor()
    from orchestrator.executors.ray import RayExecutor

    return RayExecutor(None if where == "ray" else where)


def cancel_flag(run: Run) -> Path:
    """The file that asks a run's driver to stop; ``moepipe cancel`` writes it."""
    return run.path / "cancel"


class StopRequests:
    """Ctrl-C, SIGTERM and ``moepipe cancel``, turned into the scheduler's two events.

    The first asks members to stop at their next checkpoint, the second ends them now, the third ends this process.
    A signal's handler runs between any two instructions of the main thread, which may hold the lock of an event or of
    the terminal just then: it only leaves word, and :meth:`serve` in another thread does the rest.
    """

    def __init__(self, display: Display, run: Run) -> None:
        self.stop, self.kill = threading.Event(), threading.Event()
        self._display, self._run = display, run
        self._words: SimpleQueue[str] = SimpleQueue()  # the one queue that its own thread may interrupt
        self._asked = self._ending = False

    def serve(self, seconds: float) -> None:
        """Do what the next signal asks for; wait at most so long for one."""
        with suppress(Empty):
            word = self._words.get(timeout=seconds)
            if word == "kill":
                self._display.note("Ending the members now.")
                self.kill.set()
            elif word:
                self.graceful(word)

    def wake(self) -> None:
        """End the waiting of :meth:`serve`."""
        self._words.put("")

    def graceful(self, why: str) -> None:
        """Ask members to stop at their next checkpoint."""
        if not self.stop.is_set():
            self.stop.set()
            self._display.note(
                f"{why}: nothing new starts, members stop at their next checkpoint. Ctrl-C again ends them now; "
                f"either way `moepipe resume {self._run.id}` continues."
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not (self._asked or self.stop.is_set()):
            self._asked = True
            self._words.put("Stopping" if number == signal.SIGINT else "Asked to end")
        elif number == signal.SIGINT and not self._ending:
            self._ending = True
            self._words.put("kill")
            raise KeyboardInterrupt
        elif number == signal.SIGINT:
            os._exit(130)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside (in the main thread; elsewhere only the cancel flag counts)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Watch(threading.Thread):
    """Serves stop signals, and looks at the cancel flag and at the MLflow process while the run goes on."""

    def __init__(self, run: Run, stops: StopRequests, display: Display, mirror: Mirror | None) -> None:
        super().__init__(name="moepipe-watch", daemon=True)
        self._run, self._stops, self._display, self._mirror = run, stops, display, mirror
        self._begun = self._done = False

    def begin(self) -> None:
        """The run is ours: look at its flag, too."""
        self._begun = True

    def end(self) -> None:
        """Nothing more to watch."""
        self._done = True
        self._stops.wake()
        self.join()

    def run(self) -> None:
        """Thread body."""
        looked = time.monotonic()
        while not self._done:
            self._stops.serve(_WATCH_S)
            if self._begun and time.monotonic() - looked >= _WATCH_S:
                looked = time.monotonic()
                if cancel_flag(self._run).exists():
                    self._stops.graceful("Cancelled")
                self.report_tracking()

    def report_tracking(self) -> None:
        """Say once when MLflow does not work."""
        problem = self._mirror.problem() if self._mirror else ""
        if problem:
            self._display.note(f"warning: {problem}")


def drive(run: Run, graph: Graph, store: Store, executor: Executor, data_root: Path, display: Display) -> Driven:
    """Execute a run with progress, stop signals and tracking.

    What members print goes to stderr: stdout is for results.

    Raises:
        BusyError, InfeasibleError, EnvironmentProblem: see :func:`orchestrator.scheduler.execute`.
    """
    from orchestrator.scheduler import execute

    spec = graph.spec
    mirror = Mirror(run, store, tracking_uri(spec, store)) if spec.tracking.enabled else None
    stops = StopRequests(display, run)
    watch = _Watch(run, stops, display, mirror)

    def begin(event: Event) -> None:
        # The lock is ours from here on: an old wish to stop is void, and nobody else mirrors this run.
        if event.kind == "run-started":
            cancel_flag(run).unlink(missing_ok=True)
            watch.begin()
            if mirror is not None:
                mirror.start()

    watch.start()
    try:
        with display, stops.installed(), redirect_stdout(sys.stderr):
            outcome = execute(graph, store, run, executor, [begin, display], data_root, stops.stop, stops.kill)
    finally:
        watch.end()
    return Driven(outcome, mirror)


def cancel(run: Run, wait_s: float) -> str:
    """Ask a running run to stop and wait for it; returns its status then."""
    run.request_stop()
    deadline = time.monotonic() + wait_s
    while run.status == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    status = run.status
    if status != "running":
        cancel_flag(run).unlink(missing_ok=True)
    return status
