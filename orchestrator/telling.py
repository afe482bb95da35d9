"""Events of a run as they happen: into the record first, then to the listeners."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from moe.errors import MoepipeError
from orchestrator.events import Event, EventKind
from orchestrator.policies import Decision
from orchestrator.runs import Run

Listener = Callable[[Event], None]
_LOG = logging.getLogger("moepipe.scheduler")


class Teller:
    """Records events and passes them on. What a listener does with an event must not decide the run."""

    def __init__(self, run: Run, listeners: Sequence[Listener]) -> None:
        self.run = run
        self._listeners = list(listeners)

    def tell(self, kind: EventKind, node: str = "", **data: Any) -> None:
        """Record an event that happens now and pass it on."""
        self.notify(self.run.record(kind, node, **data))

    def notify(self, event: Event) -> None:
        """Pass on an event that is recorded already; a listener that raises gets no more."""
        self._listeners = [listener for listener in self._listeners if _call(listener, event)]

    def failure(self, node: str, decision: Decision, error: MoepipeError) -> None:
        """The event of a failure, with the decision's line."""
        self.tell(
            "member-failed",
            node,
            decision=decision.action,
            cause=decision.cause,
            count=decision.count,
            limit=decision.limit,
            error=error.message,
            hint=error.hint,
            code=error.code,
            line=decision.line,
        )

    def skipped(self, node: str, error: MoepipeError) -> None:
        """The event of a node that was not started because of what failed before it."""
        self.failure(node, Decision("skip", "upstream", 1, 0, error.message), error)


def _call(listener: Listener, event: Event) -> bool:
    try:
        listener(event)
    except Exception:
        _LOG.exception("A listener of the run failed and gets no more events.")
        return False
    return True
