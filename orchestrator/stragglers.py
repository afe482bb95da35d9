"""Members that take far longer than their siblings: said once, in the record and on the terminal. Nothing is stopped.

Whether a slow member is stuck or has a slow machine nobody here can know; ``timeout_s`` of the stage ends one that
takes too long, and a process that stands still is found by its silence (:mod:`orchestrator.executors.ray_life`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median

FACTOR = 3.0
LEAST_S = 60.0
SIBLINGS = 3
EVERY_S = 5.0


class Stragglers:
    """Compares members that run with finished ones of the same stage.

    Args:
        clock: seconds, monotonic (tests pass their own).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._took: dict[str, list[float]] = {}
        self._told: set[str] = set()
        self._looked = clock()

    def finished(self, stage: str, weight: float, seconds: float) -> None:
        """A member of ``stage`` with this weight (its share of the work) took so long."""
        self._took.setdefault(stage, []).append(seconds / max(weight, 1e-9))

    def due(self) -> bool:
        """Whether it is time to look again."""
        now = self._clock()
        if now - self._looked < EVERY_S:
            return False
        self._looked = now
        return True

    def slow(self, running: Iterable[tuple[str, str, float, float]]) -> dict[str, str]:
        """Node -> what to say, once each; ``running``: node, stage, weight and the time it was started."""
        now = self._clock()
        found: dict[str, str] = {}
        for node, stage, weight, since in running:
            took = self._took.get(stage, [])
            if node in self._told or now - since < LEAST_S or len(took) < SIBLINGS:
                continue
            usual = median(took) * weight
            if now - since > FACTOR * usual:
                self._told.add(node)
                found[node] = (
                    f"runs for {now - since:.0f} s; its {len(took)} finished siblings took {usual:.0f} s (median). "
                    "Its machine may be slow, or it is stuck: look at its log; timeout_s would end it."
                )
        return found
