"""Events folded into what people ask about: how far each member and stage is. For live progress, status and show."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.events import Event
from orchestrator.tracking_state import parse_node

State = Literal["waiting", "running", "hit", "finished", "failed", "stopped", "skipped"]
DONE: tuple[State, ...] = ("hit", "finished")
PACE_S, PACE_EVERY_S = 300.0, 1.0
"""The stretch of time from which a member's speed is told, and how often a point of it is kept."""
OVER: tuple[State, ...] = ("hit", "finished", "failed", "stopped", "skipped")


@dataclass
class NodeView:
    """One member.

    Attributes:
        node: id.
        state: where it is.
        attempts: times it was started.
        started: seconds since 1970 of the last start, or None.
        ended: seconds since 1970 of the end, or None.
        done: units of work done, of ``total`` (0 when it never said).
        values: last numbers shown beside the bar (loss ...).
        metrics: last value of each recorded metric.
        artifact: digest of what it made.
        error: message of the last failure.
        log: last log line.
        pace: (seconds since 1970, units done) of reports since the last start, oldest first, the last minutes of them.
        begun: part that was already done when it last started: an earlier session's work, resumed.
    """

    node: str
    state: State = "waiting"
    attempts: int = 0
    started: float | None = None
    ended: float | None = None
    done: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    artifact: str = ""
    error: str = ""
    log: str = ""
    pace: deque[tuple[float, int]] = field(default_factory=deque)
    begun: float = 0.0

    @property
    def fraction(self) -> float:
        """Part that is done, 0 to 1."""
        if self.state in DONE:
            return 1.0
        return min(1.0, self.done / self.total) if self.total else 0.0

    def seconds(self, now: float) -> float | None:
        """Duration of the last attempt so far, in seconds."""
        if self.started is None or self.state == "hit":
            return None
        return (self.ended or now) - self.started

    def eta(self, now: float) -> float | None:
        """Seconds left at the speed of the last minutes; None when unknown.

        A first report of more than one unit says nothing yet: after a resume it counts the work of an earlier session.
        """
        if self.state != "running" or not self.pace or self.started is None:
            return None
        since, before = self.pace[0] if len(self.pace) > 1 else (self.started, 0)
        last, done = self.pace[-1]
        if last <= since or done <= before or (len(self.pace) == 1 and done > 1):
            return None
        return max(0.0, (self.total - done) * (last - since) / (done - before) - (now - last))


@dataclass
class StageSummary:
    """One stage: its members counted by state, and the mean of their progress."""

    name: str
    members: list[NodeView]

    def count(self, *states: State) -> int:
        """Members in one of ``states``."""
        return sum(member.state in states for member in self.members)

    @property
    def state(self) -> State:
        """One word for the stage."""
        if self.count("failed"):
            return "failed"
        if self.count("running"):
            return "running"
        if self.count("hit") == len(self.members):
            return "hit"
        if self.count(*DONE) == len(self.members):
            return "finished"
        for word in ("stopped", "skipped"):
            if self.count(word):
                return word
        return "running" if self.count(*DONE) else "waiting"

    @property
    def fraction(self) -> float:
        """Part that is done, 0 to 1."""
        return sum(member.fraction for member in self.members) / max(1, len(self.members))

    def seconds(self, now: float) -> float | None:
        """Wall time from the first start to the last end (or now)."""
        starts = [member.started for member in self.members if member.started is not None and member.state != "hit"]
        if not starts:
            return None
        running = any(member.state == "running" for member in self.members)
        ends = [member.ended for member in self.members if member.ended is not None and member.state != "hit"]
        return (now if running or not ends else max(ends)) - min(starts)

    def eta(self, now: float) -> float | None:
        """Seconds left when the stage goes on as it did, hits and resumed work apart; None when unknown."""
        elapsed = self.seconds(now)
        worked = sum(member.fraction - member.begun for member in self.members if member.state != "hit")
        if self.state != "running" or not elapsed or worked <= 0:
            return None
        return elapsed * sum(1 - member.fraction for member in self.members) / worked

    @property
    def values(self) -> dict[str, float]:
        """Mean over the running members of their last numbers."""
        rows = [member.values for member in self.members if member.state == "running" and member.values]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}


class RunView:
    """The state of a run after some events.

    Args:
        nodes: ids of all nodes in order; nodes that only events know are added.
    """

    def __init__(self, nodes: Iterable[str] = ()) -> None:
        self.nodes = {node: NodeView(node) for node in nodes}
        self.started: float | None = None
        self.ended: float | None = None
        self.status = "waiting"
        self.last: dict[str, Any] = {}

    def add(self, event: Event) -> NodeView | None:
        """Fold one event in; returns the member it is about."""
        if event.kind == "run-started":
            self.started, self.ended, self.status = self.started or event.time, None, "running"
            return None
        if event.kind == "run-finished":
            self.ended, self.status, self.last = event.time, str(event.data.get("status", "finished")), dict(event.data)
            for view in self.nodes.values():
                if view.state == "running":
                    view.state, view.ended = "stopped", event.time
                elif view.state == "waiting":
                    view.state = "skipped"
            return None
        view = self.nodes.setdefault(event.node, NodeView(event.node))
        _FOLD[event.kind](view, event)
        return view

    @property
    def stages(self) -> list[StageSummary]:
        """Stages in order."""
        grouped: dict[str, list[NodeView]] = {}
        for view in self.nodes.values():
            grouped.setdefault(parse_node(view.node)[0], []).append(view)
        return [StageSummary(name, members) for name, members in grouped.items()]

    def running(self) -> Sequence[NodeView]:
        """Members that run."""
        return [view for view in self.nodes.values() if view.state == "running"]

    def count(self, *states: State) -> int:
        """Members in one of ``states``."""
        return sum(view.state in states for view in self.nodes.values())


def _started(view: NodeView, event: Event) -> None:
    view.state, view.started, view.ended, view.error = "running", event.time, None, ""
    view.attempts = int(event.data.get("attempt", view.attempts + 1))
    view.pace.clear()
    view.begun = 0.0


def _progress(view: NodeView, event: Event) -> None:
    done, total = int(event.data["done"]), int(event.data["total"])
    if view.pace and (done < view.pace[-1][1] or total != view.total):
        view.pace.clear()  # it counts something else now
    elif not view.pace and 1 < done < total:
        view.begun = done / total
    if len(view.pace) < 2 or event.time - view.pace[-2][0] >= PACE_EVERY_S:
        view.pace.append((event.time, done))
    else:
        view.pace[-1] = (event.time, done)
    while len(view.pace) > 2 and event.time - view.pace[1][0] > PACE_S:
        view.pace.popleft()
    view.done, view.total = int(event.data["done"]), int(event.data["total"])
    view.values = dict(event.data.get("values") or {})


def _metrics(view: NodeView, event: Event) -> None:
    view.metrics.update(event.data.get("values") or {})


def _log(view: NodeView, event: Event) -> None:
    view.log = str(event.data.get("message", ""))


def _hit(view: NodeView, event: Event) -> None:
    view.state, view.artifact = "hit", str(event.data.get("digest", ""))


def _finished(view: NodeView, event: Event) -> None:
    view.state, view.ended, view.artifact = "finished", event.time, str(event.data.get("digest", ""))
    view.error = ""
    # A quick member's start may be heard of late; its own clock knows better.
    begun = event.time - float(event.data.get("seconds") or 0.0)
    view.started = begun if view.started is None else min(view.started, begun)


_AFTER_FAILURE: dict[str, State] = {"retry": "waiting", "stop": "stopped", "skip": "skipped"}


def _failed(view: NodeView, event: Event) -> None:
    view.state = _AFTER_FAILURE.get(str(event.data.get("decision")), "failed")
    view.ended, view.error = event.time, str(event.data.get("error", ""))


_FOLD = {
    "member-started": _started,
    "member-progress": _progress,
    "member-metrics": _metrics,
    "member-log": _log,
    "member-hit": _hit,
    "member-finished": _finished,
    "member-failed": _failed,
}
