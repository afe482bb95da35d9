"""Whether a ready node may start now: the ledger, patience for large nodes, and a cluster that changes its size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from orchestrator.capacity import Capacity, Ledger, rank_demand, require_fit
from orchestrator.graph import Graph

Shape = tuple[int | tuple[str, float], ...]
PATIENCE_S = 30.0
PENDING_S = 300.0
LOOK_S = 10.0


class Admission:
    """Takes and gives back the resources of nodes.

    Args:
        graph: the graph.
        capacity: asks the executor what there is; None when resources are not counted.
    """

    def __init__(self, graph: Graph, capacity: Callable[[], Capacity | None]) -> None:
        self._graph = graph
        self._capacity = capacity
        self._ledger: Ledger | None = None
        self._passed_over: dict[str, float] = {}
        self._reserved: set[str] = set()
        self._full: set[Shape] = set()
        self._starved: float | None = None
        self._slots: dict[str, int] = {}
        self._looked = time.monotonic()

    def open(self, names: Iterable[str]) -> None:
        """Ask for the capacity, at the first miss (a run of hits never starts Ray).

        Raises:
            InfeasibleError: one of ``names`` can never run.
        """
        if self._ledger is not None:
            return
        capacity = self._capacity()
        if capacity is not None:
            require_fit([(name, self._graph.nodes[name].resources) for name in names], capacity)
            self._ledger = Ledger(capacity)

    def new_round(self) -> None:
        """Begin a pass over the ready nodes, longest first."""
        self._reserved = set()
        self._full = set()
        if time.monotonic() - self._looked > LOOK_S:
            self.refresh()  # a host that came back is used again

    def take(self, name: str) -> bool:
        """Take a node's resources. One that was passed over for long keeps smaller ones off what it waits for."""
        if self._ledger is None:
            return True
        resources = self._graph.nodes[name].resources
        demand = rank_demand(resources)
        shape: Shape = (resources.workers, *sorted(demand.items()))
        wanted = set(demand)
        # A thousand ready members are mostly of one shape: when one does not fit, others of the round do not either.
        if shape not in self._full and not (wanted & self._reserved):
            if self._ledger.take(name, resources):
                self._passed_over.pop(name, None)
                self._widen(name)
                return True
            self._full.add(shape)
        now = time.monotonic()
        if now - self._passed_over.setdefault(name, now) > PATIENCE_S:
            self._reserved |= wanted
        return False

    def _widen(self, name: str) -> None:
        """Give a node that can use its resources several times over as much of the rest as it wants."""
        node, taken = self._graph.nodes[name], 1
        most = self._graph.stages[node.stage].stage.slots(node.config)
        while taken < most and self._ledger and self._ledger.take(f"{name}#{taken}", node.resources):
            taken += 1
        if most > 1:
            self._slots[name] = taken

    def slots(self, name: str) -> int:
        """How many times its resources a node has taken."""
        return self._slots.get(name, 1)

    def give_back(self, name: str) -> None:
        """Free a node's resources."""
        if self._ledger is not None:
            self._ledger.give_back(name)
            for number in range(1, self._slots.pop(name, 1)):
                self._ledger.give_back(f"{name}#{number}")

    def refresh(self) -> Capacity | None:
        """Ask again how much there is (after machines failed, or may have come)."""
        self._looked = time.monotonic()
        capacity = None if self._ledger is None else self._capacity()
        if capacity is not None and self._ledger is not None:
            self._ledger.resize(capacity)
        return capacity

    def watch(self, idle: bool, ready: Iterable[str]) -> None:
        """Follow a cluster that shrank: wait for machines to come back, then say what is missing.

        Args:
            idle: nothing runs although something is ready.
            ready: what is ready.

        Raises:
            InfeasibleError: for five minutes there was no room.
        """
        if not idle or self._ledger is None:
            self._starved = None
            return
        now = time.monotonic()
        self._starved = self._starved or now
        capacity = self.refresh()
        if capacity is not None and now - self._starved > PENDING_S:
            require_fit([(name, self._graph.nodes[name].resources) for name in ready], capacity)
