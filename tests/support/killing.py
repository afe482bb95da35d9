"""A listener that kills members at given points, and what a run says after it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.events import Event
from orchestrator.executors.ray import RayExecutor
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline


class Killer:
    """Kills each victim once, with SIGKILL.

    Args:
        victims: member -> units of work after which it dies; 0: as soon as it has started.
    """

    def __init__(self, victims: Mapping[str, int]) -> None:
        self.victims = victims
        self.killed: list[str] = []
        self._pids: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Look at one event of the run."""
        if event.kind == "member-started":
            self._pids[event.node] = event.data["pid"]
        done = event.data.get("done", 0) if event.kind in ("member-started", "member-progress") else -1
        if event.node in self.victims and event.node not in self.killed and done >= self.victims[event.node]:
            self.killed.append(event.node)
            os.kill(self._pids[event.node], signal.SIGKILL)


def check_only_victims_run_again(stages: Mapping[str, Any], victims: Mapping[str, int], resumed: str, folder: Path):
    """Run the stages calmly inline and, with the kills, on Ray: the same digests, and only the victims tried twice.

    Args:
        stages: of the pipeline.
        victims: as for :class:`Killer`.
        resumed: the victim that must have gone on from a checkpoint.
        folder: for two stores.
    """
    calm, _ = go(pipeline(stages), Store.open(folder / "calm"))
    assert calm.status == "finished"
    killer = Killer(victims)
    outcome, run = go(pipeline(stages), Store.open(folder / "store"), RayExecutor(), listeners=[killer])
    assert set(killer.killed) == set(victims)
    assert outcome.status == "finished"
    assert outcome.artifacts == calm.artifacts
    events = list(run.events())
    starts = Counter(event.node for event in events if event.kind == "member-started")
    assert {node for node, count in starts.items() if count > 1} == set(victims)
    assert starts.keys() == calm.artifacts.keys()
    failed = [(event.node, event.data["decision"]) for event in events if event.kind == "member-failed"]
    assert sorted(failed) == sorted((victim, "retry") for victim in victims), failed
    assert "Resumed at step" in run.log_path(resumed).read_text()
