"""How a pipeline fits a cluster: of each stage, how many members can run at once and on how many machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.capacity import Capacity, Ledger
from orchestrator.graph import Graph


@dataclass(frozen=True)
class Fit:
    """One stage on an empty cluster.

    Attributes:
        stage: its name.
        members: that are to run.
        at_once: as many of them as have room at the same time.
        machines: over which those spread, filled one after the other.
    """

    stage: str
    members: int
    at_once: int
    machines: int

    def words(self) -> str:
        """``experts 16 of 20 on 4 machines``."""
        place = "" if self.machines <= 1 else f" on {self.machines} machines"
        return f"{self.stage} {self.at_once} of {self.members}{place}"


def fits(graph: Graph, todo: Sequence[str], capacity: Capacity) -> list[Fit]:
    """The fit of every stage with members to run.

    Args:
        graph: the graph.
        todo: ids of the nodes that would run.
        capacity: what there is (and may come).
    """
    by_stage: dict[str, list[str]] = {}
    for name in todo:
        by_stage.setdefault(graph.nodes[name].stage, []).append(name)
    found = []
    for stage, names in by_stage.items():
        ledger = Ledger(capacity)
        taken = [name for name in names if ledger.take(name, graph.nodes[name].resources)]
        found.append(Fit(stage, len(names), len(taken), len(ledger.machines(taken))))
    return found


def to_json(found: Sequence[Fit]) -> Mapping[str, Any]:
    """By stage."""
    return {fit.stage: {key: value for key, value in asdict(fit).items() if key != "stage"} for fit in found}
