"""Trials of a search that stand still: for trials what :mod:`orchestrator.executors.ray_life` is for members."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.executors.gang import free_places
from orchestrator.executors.ray_life import VARIABLE, Lives

_ANSWER_S = 10.0


def trial_of(node: str) -> str:
    """The number of the trial in the node name of one of its runs, e.g. ``3`` of ``s/seed=0/trial=3/run=1``."""
    return node.rpartition("/trial=")[2].partition("/")[0]


class TrialLives:
    """Ends the process of a trial that gives no sign of life: Tune starts the trial again, as often as it may.

    Args:
        sink: actor with the methods of :class:`orchestrator.executors.ray_actors.Sink`; trials and ranks beat there.
        stall_s: silence after which a process counts as lost; 0 is never.
        say: takes a line for the search's log.
    """

    def __init__(self, sink: Any, stall_s: float, say: Callable[[str], None]) -> None:
        self._sink, self._say = sink, say
        self._lives = Lives(stall_s)

    def look(self) -> None:
        """Take the signs of life so far, and end who was silent for too long."""
        with suppress(RayError):
            for signal in ray.get(self._sink.drain.remote(), timeout=_ANSWER_S):
                if signal.kind == "beat":
                    self._lives.take(signal)
            self._lives.listen()
            for node, words in self._lives.silent().items():
                self._lives.forget(node)
                _, actor = self._runner(trial_of(node))
                if actor is not None:
                    self._say(f"trial {trial_of(node)}: {words} and counts as lost ({VARIABLE}): its process is ended")
                    ray.kill(actor)

    def ended(self, trial: int, died: bool) -> None:
        """A trial has ended for good; ranks that died over it are silent from now on.

        Args:
            trial: its number.
            died: it ended because its process did, once too often: nobody else frees what its ranks held.
        """
        for node in [node for node in self._lives.nodes() if trial_of(node) == str(trial)]:
            self._lives.forget(node)
        if died:
            with suppress(RayError):
                runner, _ = self._runner(str(trial))
                if runner:
                    free_places(self._sink, runner)

    def _runner(self, trial: str) -> tuple[str, Any]:
        found: tuple[str, Any] = ray.get(self._sink.runner.remote(trial), timeout=_ANSWER_S)
        return found
