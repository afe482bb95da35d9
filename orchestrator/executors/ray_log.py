"""Words of a process inside Ray: signals to the sink, prints into the member's log; and where its imports come from."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.executors.base import Signal


def add_paths(paths: Sequence[str]) -> None:
    """Make modules importable that the driver can import (its script's folder, pytest's root, ...)."""
    sys.path.extend(path for path in paths if path not in sys.path)


def import_ahead(modules: Sequence[str]) -> None:
    """Import what members will need; what is not there is missed, with a reason, by the member that needs it."""
    for module in modules:
        with suppress(ImportError):
            importlib.import_module(module)


class SinkEmit:
    """An ``emit`` that pickles: sends to the sink and does not wait."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._last: Any = None

    def __call__(self, signal: Signal) -> None:
        """Send one signal."""
        with suppress(RayError):
            self._last = self._sink.push.remote([signal])

    def settle(self) -> None:
        """Wait until the last signal has arrived, so that the result does not overtake it."""
        if self._last is not None:
            with suppress(RayError):
                ray.get(self._last, timeout=10)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SinkEmit, (self._sink,))


@contextmanager
def captured(path: Path) -> Iterator[None]:
    """Everything this process writes goes into the member's log: prints, logging, and what C++ libraries say.

    On a machine that does not see the folder, it stays in Ray's own log of the worker.
    """
    if not path.parent.is_dir():
        yield
        return
    with path.open("a", encoding="utf-8", buffering=1) as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        saved = os.dup(1), os.dup(2)
        root = logging.getLogger()
        root.addHandler(handler)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with redirect_stdout(log), redirect_stderr(log):
                yield
        finally:
            root.removeHandler(handler)
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
