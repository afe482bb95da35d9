"""Trials of a search that stand still: for trials what :mod:`orchestrator.executors.ray_life` is for members."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.executors.ray_life import VARIABLE, Lives

_ANSWER_S = 10.0


def trial_of(node: str) -> str:
    """The number of the trial in the node name of one of its runs, e.g. ``3`` of ``s/seed=0/trial=3/run=1``."""
    return node.rpartition("/trial=")[2].partition("/")[0]


class TrialLives:
    """Ends the process of a trial that gives no sign of life, so that Tune starts the trial again.

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
                actor = ray.get(self._sink.actor.remote(trial_of(node)), timeout=_ANSWER_S)
                if actor is not None:
                    self._say(f"trial {trial_of(node)}: {words} and counts as lost ({VARIABLE}); it is tried again")
                    ray.kill(actor)
