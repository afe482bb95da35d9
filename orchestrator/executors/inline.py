"""Runs members one after another in this very process: for a debugger, for unit tests, and where Ray cannot run."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from orchestrator.capacity import Capacity
from orchestrator.context import run_here, run_member
from orchestrator.executors.base import Deliver, Signal, Task
from orchestrator.spec import Resources


class _Tee:
    """A text stream that writes to the terminal and into the member's log; a debugger's prompt stays visible."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal = terminal
        self._log = log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._terminal.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)


@contextmanager
def _captured(path: Path) -> Iterator[None]:
    """What the member prints and logs is kept in its log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        out, err = sys.stdout, sys.stderr
        logging.getLogger().addHandler(handler)
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err
            logging.getLogger().removeHandler(handler)


class InlineExecutor:
    """See :class:`orchestrator.executors.base.Executor`.

    Resources are not counted: a member gets the whole process, and a gang runs at world size 1. A member cannot be
    killed here, so ``timeout_s`` is not enforced.
    """

    def __init__(self) -> None:
        self._queue: deque[Task] = deque()
        self._stop = threading.Event()

    def attach(self, stop: threading.Event) -> None:
        """See :class:`orchestrator.executors.base.Executor`."""
        self._stop = stop

    def capacity(self) -> Capacity | None:
        """Not counted."""
        return None

    def slots(self) -> int | None:
        """One at a time."""
        return 1

    def start(self, task: Task) -> None:
        """See :class:`orchestrator.executors.base.Executor`."""
        self._queue.append(task)

    def expect(self, resources: Resources, modules: Sequence[str]) -> None:
        """Nothing to prepare: ranks are this process."""

    def poll(self, timeout: float, deliver: Deliver) -> None:
        """Run the next task to its end; its signals are delivered while it runs."""
        if not self._queue:
            self._stop.wait(timeout)
            return
        task = self._queue.popleft()
        with _captured(Path(task.log)):
            result: Signal = run_member(task, deliver, run_here, self._stop.is_set)
        deliver(result)

    def cancel(self, node: str, kill: bool = False) -> None:
        """Forget it when it has not begun. A running one sees the stop event at its next checkpoint."""
        self._queue = deque(task for task in self._queue if task.node != node)

    def close(self) -> None:
        """See :class:`orchestrator.executors.base.Executor`."""
        self._queue.clear()
