"""The reporting half of a context: progress, metrics, log lines and the stop check, made cheap.

An object of this class travels to the first rank of a gang as well, so it holds nothing but plain data and an
``emit`` that pickles.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.errors import Interrupted
from orchestrator.executors.base import Signal

Emit = Callable[[Signal], None]
INTERVAL_S = 0.2


class TaskReporter:
    """See :class:`workers.context.Reporter`.

    Args:
        node: whose progress it is.
        emit: takes signals to the scheduler.
        flag: file whose existence asks for a stop.
        log: path of the member's log.
        stop: answers whether this process was asked to stop (inline execution).
    """

    def __init__(self, node: str, emit: Emit, flag: Path, log: Path, stop: Callable[[], bool] | None = None) -> None:
        self.node = node
        self._emit = emit
        self._flag = flag
        self._log = log
        self._stop = stop
        self._pending: dict[str, Any] | None = None
        self._sent = 0.0
        self.samples: deque[tuple[dict[str, float], int]] = deque()  # of the process, taken by another thread

    def progress(self, done: int, total: int, **values: float) -> None:
        """At most five times a second something is sent, the newest state wins; scores (``val/...``) go at once."""
        numbers = {name: float(value) for name, value in values.items()}
        self._pending = {"done": int(done), "total": int(total), "values": numbers}
        scored = any(name.startswith("val/") for name in numbers)
        if scored or time.monotonic() - self._sent >= INTERVAL_S:
            self.flush()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Every call is sent: these are results, not decoration."""
        data = {"values": {name: float(value) for name, value in values.items()}, "step": step}
        self._emit(Signal(self.node, "metrics", data))

    def log(self, message: str) -> None:
        """One line into the log and into the run record."""
        if self._log.parent.is_dir():
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%H:%M:%S')} {message}\n")
        self._emit(Signal(self.node, "log", {"message": message}))

    def check(self) -> None:
        """See :class:`workers.context.Reporter`."""
        if self._flag.exists() or (self._stop is not None and self._stop()):
            raise Interrupted(f"{self.node} was asked to stop.", "Its state up to the last checkpoint is kept.")

    def flush(self) -> None:
        """Send the newest progress that has not been sent, and what the process was seen to use."""
        while self.samples:
            self.metrics(*self.samples.popleft())
        if self._pending is not None:
            self._emit(Signal(self.node, "progress", self._pending))
            self._pending = None
            self._sent = time.monotonic()
