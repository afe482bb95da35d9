"""Log lines from the run record and from members' log files; works long after the machines are gone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from moe.errors import NotFoundError, SpecError, nearest
from orchestrator.events import Event
from orchestrator.runs import Run

_POLL_S = 0.3
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d) ")


@dataclass(frozen=True)
class Filter:
    """Which lines to show.

    Attributes:
        pattern: regular expression that a line must contain, or None.
        after: seconds since 1970; older lines are left out.
    """

    pattern: re.Pattern[str] | None
    after: float

    @staticmethod
    def parse(grep: str | None, since: str | None) -> Filter:
        """From the texts of ``--grep`` and ``--since``.

        Raises:
            SpecError: not a regular expression, or not a duration.
        """
        try:
            pattern = re.compile(grep) if grep else None
        except re.error as error:
            raise SpecError(
                f"--grep {grep!r} is not a regular expression: {error}.", "Escape special characters."
            ) from None
        if since is None:
            return Filter(pattern, 0.0)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", since)
        if match is None:
            raise SpecError(f"--since {since!r} is not a duration.", "Write a number and a unit: 90s, 10m, 2h or 1d.")
        return Filter(pattern, time.time() - float(match[1]) * _UNITS[match[2]])

    def takes(self, line: str, when: float | None) -> bool:
        """Whether a line of this time (None: unknown) is shown."""
        return (when is None or when >= self.after) and (self.pattern is None or bool(self.pattern.search(line)))


def run_lines(run: Run, chosen: Filter, follow: bool) -> Iterator[str]:
    """What happened in a run, one line per event, without progress and metrics."""
    position = 0
    while True:
        ended = run.status != "running"
        for event, after in run.follow(position):
            position = after
            text = _words(event)
            line = f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.node or run.id}: {text}"
            if text and chosen.takes(line, event.time):
                yield line
        if not follow or ended:
            return
        time.sleep(_POLL_S)


def _words(event: Event) -> str:
    data = event.data
    if event.kind == "run-started":
        return f"started, {data.get('nodes', '?')} members"
    if event.kind == "run-finished":
        return f"{data['status']}, {data.get('hits', 0)} hits"
    if event.kind == "member-hit":
        return f"hit {str(data['digest'])[:12]}"
    if event.kind == "member-started":
        return f"started, attempt {data.get('attempt', 1)}"
    if event.kind == "member-finished":
        return f"finished in {data.get('seconds', 0)} s, {str(data['digest'])[:12]}"
    if event.kind == "member-failed":
        return str(data.get("line") or data.get("error", ""))
    return str(data.get("message", "")) if event.kind == "member-log" else ""


def node_lines(run: Run, node: str, chosen: Filter, follow: bool) -> Iterator[str]:
    """A member's log file, line by line.

    Raises:
        NotFoundError: the run has no such member, or it has no log.
    """
    path = run.log_path(node)
    if not path.exists():
        told = {event.node for event in run.events() if event.node}
        if node not in told:
            raise NotFoundError(f"Run {run.id} has no log of a member {node!r}.", nearest(node, told))
        if not follow:
            hit = any(event.kind == "member-hit" and event.node == node for event in run.events())
            why = "it is a hit and did not run" if hit else "it did not start, or printed nothing"
            raise NotFoundError(f"{node} has no log in run {run.id}: {why}.", f"moepipe show {run.id} {node}")
    position, when = 0, None
    while True:
        ended = run.status != "running"
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                data = stream.read()
            whole = data if ended else data[: data.rfind(b"\n") + 1]
            position += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                when = _clock(line, path.stat().st_mtime, when)
                if chosen.takes(line, when):
                    yield line
        if not follow or ended:
            return
        time.sleep(_POLL_S)


def _clock(line: str, modified: float, before: float | None) -> float | None:
    """Time of a line that begins with HH:MM:SS, at most a day before the file's last change; else as before."""
    match = _CLOCK.match(line)
    if match is None:
        return before
    day = time.localtime(modified)
    parts = (day.tm_year, day.tm_mon, day.tm_mday, int(match[1]), int(match[2]), int(match[3]), 0, 0, -1)
    when = time.mktime(parts)
    return when - 86400.0 if when > modified + 60 else when
