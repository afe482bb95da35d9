"""Events: the only thing that is ever written while a run goes on, one JSON object per line, appended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe.errors import EnvironmentProblem
from orchestrator.artifacts import disk_problem

EventKind = Literal[
    "run-started",
    "member-hit",
    "member-started",
    "member-progress",
    "member-metrics",
    "member-log",
    "member-finished",
    "member-failed",
    "run-finished",
]


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: seconds since 1970 (UTC).
        kind: see :data:`EventKind`.
        node: id of the node, empty for events of the run.
        data: what is to be said about it, see ``docs/rules.md``.
    """

    time: float
    kind: EventKind
    node: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> bytes:
        """The event as one line of JSON."""
        record = {"time": round(self.time, 3), "kind": self.kind, "node": self.node, "data": dict(self.data)}
        # NaN is a value that a loss may take; Python reads it back.
        return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def append_event(path: Path, event: Event) -> None:
    """Append one event with a single write. A torn last line of an earlier crash is closed first.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (b"\n" if torn else b"") + event.line())
        finally:
            os.close(handle)
    except OSError as error:
        problem = disk_problem(error, path)
        raise problem or EnvironmentProblem(f"The run record {path} cannot be written: {error.strerror}.") from None


def read_events(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """The events from byte ``start`` on, each with the position after it (to follow a running run).

    A last line without its end is left for the next call; a torn line in the middle is skipped.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(start)
        position = start
        for line in stream:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            try:
                record = json.loads(line)
                yield Event(record["time"], record["kind"], record["node"], record["data"]), position
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash; the next start closed the line
