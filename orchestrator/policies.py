"""What happens after a failure: budgets by cause, after Ray Train's failure policy.

A user error fails again however often it is tried, a machine that went away does not; so each cause has its own budget
(:class:`orchestrator.spec.Retry`), and every decision is one line of a fixed form in the run record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.errors import Interrupted, MoepipeError
from orchestrator.executors.base import Cause
from orchestrator.spec import Retry

Action = Literal["retry", "fail", "stop", "skip"]
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def classify(error: BaseException) -> Cause:
    """The cause of an exception raised by a stage's own code."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MoepipeError):
        return "user"
    # By name: torch has its own class and must not be imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory"
    if isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in _MEMORY_WORDS):
        return "out_of_memory"
    return "user"


@dataclass(frozen=True)
class Decision:
    """What to do about a failure.

    Attributes:
        action: ``retry``, ``fail``, ``stop`` (the user asked for it) or ``skip`` (something before it failed).
        cause: what the failure is charged to.
        count: failures with this cause so far, this one included.
        limit: budget of the cause; -1 without limit.
        error: the message.
    """

    action: Action
    cause: Cause
    count: int
    limit: int
    error: str

    @property
    def line(self) -> str:
        """``retry: cause=infrastructure count=1 limit=3 error=...``, for logs and the run record."""
        limit = "unlimited" if self.limit < 0 else str(self.limit)
        return f"{self.action}: cause={self.cause} count={self.count} limit={limit} error={self.error}"


@dataclass
class RetryPolicy:
    """Counts the failures of one member and decides."""

    budget: Retry
    counts: dict[Cause, int] = field(default_factory=dict)

    def decide(self, cause: Cause, error: str) -> Decision:
        """Charge a failure to ``cause`` and say what to do."""
        count = self.counts[cause] = self.counts.get(cause, 0) + 1
        first = error.splitlines()[0] if error else ""
        if cause == "interrupted":
            return Decision("stop", cause, count, 0, first)
        limit: int = 0 if cause == "timeout" else getattr(self.budget, cause)
        return Decision("retry" if limit < 0 or count <= limit else "fail", cause, count, limit, first)


def enough(succeeded: int, members: int, min_success: float) -> bool:
    """Whether a fan-out counts as done: at least one member and the fraction ``min_success`` of them."""
    return succeeded >= 1 and succeeded + 1e-9 >= min_success * members


def backoff_s(attempt: int) -> float:
    """Seconds to wait before the next attempt: 0.5, 1, 2, 4 ... at most 30. Machines need a moment to come back."""
    return float(min(30.0, 0.5 * 2.0 ** (attempt - 1)))
