"""Actors that wait for their next member, and which of them must go to make room. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.capacity import Amounts, Capacity


@dataclass(frozen=True)
class Runner:
    """An actor of the pool.

    Attributes:
        actor: its handle.
        holds: what it, or the gang that it keeps, takes from Ray as long as it lives.
        gang: it keeps the ranks of a gang, and runs nothing but members of that shape.
    """

    actor: Any
    holds: Amounts
    gang: bool = False


class Pool:
    """Idle actors, by what they hold.

    Args:
        end: ends an actor.
    """

    def __init__(self, end: Callable[[Runner], None]) -> None:
        self._idle: list[Runner] = []
        self._since: dict[int, float] = {}
        self._end = end

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def idle(self) -> list[Runner]:
        """The actors that wait."""
        return list(self._idle)

    def give(self, runner: Runner) -> None:
        """An actor has nothing to do."""
        self._idle.append(runner)
        self._since[id(runner)] = time.monotonic()

    def take(self, holds: Amounts, gang: bool = False) -> Runner | None:
        """An idle actor of this shape, if there is one; the one that worked last, whose pages are warm."""
        for runner in reversed(self._idle):
            if runner.holds == holds and runner.gang == gang:
                self._idle.remove(runner)
                return runner
        return None

    def make_room(
        self, demand: Mapping[str, float], busy: Iterable[Mapping[str, float]], capacity: Capacity | None
    ) -> None:
        """End idle actors that hold what ``demand`` needs, as few as possible.

        Args:
            demand: what is about to be taken from Ray.
            busy: what is taken by members that run.
            capacity: what there is. Over several machines sums do not say where there is room, so all rivals go.
        """
        taken = list(busy)
        for runner in list(self._idle):
            if not set(runner.holds) & set(demand):
                continue
            if capacity is not None and len(capacity.machines) == 1:
                held = [*taken, *(idle.holds for idle in self._idle)]
                total = capacity.total
                sums = {name: sum(amounts.get(name, 0.0) for amounts in held) for name in demand}
                if all(sums[name] + amount <= total.get(name, 0.0) + 1e-9 for name, amount in demand.items()):
                    return
            self._idle.remove(runner)
            self._end(runner)

    def end_where(self, condition: Callable[[Runner], bool]) -> None:
        """End the idle actors for which ``condition`` holds."""
        for runner in [runner for runner in self._idle if condition(runner)]:
            self._idle.remove(runner)
            self._end(runner)

    def end_idle_gangs(self, seconds: float) -> None:
        """End gangs that have waited so long for their next member: their processes take memory, maybe devices."""
        for runner in [runner for runner in self._idle if runner.gang]:
            if time.monotonic() - self._since[id(runner)] >= seconds:
                self._idle.remove(runner)
                self._end(runner)

    def clear(self, end: bool = True) -> None:
        """Forget all of them, and end them (not when their Ray is dead)."""
        idle, self._idle = self._idle, []
        for runner in idle if end else ():
            self._end(runner)
