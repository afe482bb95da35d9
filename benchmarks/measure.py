"""Timing and the table that all benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        baseline: seconds of what a user would run instead.
        ours: seconds of this project.
        target: ratio baseline / ours that is asked for, or None.
        note: sizes, errors.
    """

    what: str
    baseline: float
    ours: float
    target: float | None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Speed-up."""
        return self.baseline / self.ours

    def to_json(self) -> dict[str, object]:
        """Plain values, the ratio and the verdict included."""
        return {**asdict(self), "ratio": self.ratio, "met": self.met}

    @property
    def met(self) -> bool:
        """Whether the target is reached (True when there is none)."""
        return self.target is None or self.ratio >= self.target


def alternate(
    sides: Sequence[Callable[[], object]], repetitions: int, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Median seconds of each side; the sides take turns, so that a busy moment hits all of them.

    The default clock counts this process' own CPU time: on a shared machine wall time says little.
    """
    for side in sides:
        side()
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(repetitions):
        for side, seconds in zip(sides, taken, strict=True):
            begin = clock()
            side()
            seconds.append(clock() - begin)
    return [statistics.median(seconds) for seconds in taken]
