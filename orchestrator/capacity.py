"""How much the machine or cluster has, what a node asks for, and the ledger of what is taken.

Amounts are plain dictionaries: ``cpus``, ``gpus``, ``memory_gb`` and custom resources by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.errors import InfeasibleError
from orchestrator.spec import Resources

Amounts = dict[str, float]
_SLACK = 1e-9


@dataclass(frozen=True)
class Capacity:
    """What each machine has.

    Attributes:
        machines: one dictionary of amounts per machine.
    """

    machines: tuple[Mapping[str, float], ...]

    @property
    def total(self) -> Amounts:
        """Amounts over all machines."""
        names = {name for machine in self.machines for name in machine}
        return {name: sum(machine.get(name, 0.0) for machine in self.machines) for name in sorted(names)}


def machine_capacity(cpus: float | None = None) -> Capacity:
    """This machine: cores that this process may use, main memory in GB, NVIDIA devices (found without CUDA)."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpus = float(sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*")))
    return Capacity(({"cpus": cores if cpus is None else float(cpus), "gpus": gpus, "memory_gb": memory},))


def rank_demand(resources: Resources) -> Amounts:
    """What one rank asks for; zeros are left out."""
    wanted = {"cpus": resources.cpus, "gpus": resources.gpus, "memory_gb": resources.memory_gb or 0.0}
    return {name: amount for name, amount in {**wanted, **resources.custom}.items() if amount > 0}


class Ledger:
    """Which amounts are taken on which machine. A node is placed whole or not at all."""

    def __init__(self, capacity: Capacity) -> None:
        self._free: list[Amounts] = []
        self._taken: dict[str, list[tuple[int, Amounts]]] = {}
        self._total: list[Amounts] = []
        self.resize(capacity)

    def resize(self, capacity: Capacity) -> None:
        """Follow a cluster that grew, shrank or was started again; what is taken stays taken."""
        self._total = [dict(machine) for machine in capacity.machines]
        self._free = [dict(machine) for machine in capacity.machines]
        for placed in self._taken.values():
            for index, demand in placed:
                if index < len(self._free):
                    _subtract(self._free[index], demand)

    def take(self, node: str, resources: Resources) -> bool:
        """Take what ``node`` needs, rank by rank; False (and nothing taken) when it does not fit now."""
        demand = rank_demand(resources)
        placed: list[tuple[int, Amounts]] = []
        for _ in range(resources.workers):
            index = next((i for i, free in enumerate(self._free) if _fits(free, demand)), None)
            if index is None:
                for at, amounts in placed:
                    _add(self._free[at], amounts)
                return False
            _subtract(self._free[index], demand)
            placed.append((index, demand))
        self._taken[node] = placed
        return True

    def machines(self, nodes: Iterable[str]) -> set[int]:
        """Numbers of the machines on which these nodes have taken something."""
        return {index for node in nodes for index, _ in self._taken.get(node, [])}

    def give_back(self, node: str) -> None:
        """Free what ``node`` took (nothing when it took nothing)."""
        for index, demand in self._taken.pop(node, []):
            if index < len(self._free):
                _add(self._free[index], demand)


def _fits(free: Mapping[str, float], demand: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) + _SLACK >= amount for name, amount in demand.items())


def _subtract(free: Amounts, demand: Mapping[str, float]) -> None:
    for name, amount in demand.items():
        free[name] = free.get(name, 0.0) - amount


def _add(free: Amounts, demand: Mapping[str, float]) -> None:
    for name, amount in demand.items():
        free[name] = free.get(name, 0.0) + amount


def misfit(node: str, resources: Resources, capacity: Capacity) -> str:
    """Why ``node`` can never run on an empty ``capacity``, in words; empty when it can."""
    if Ledger(capacity).take(node, resources):
        return ""
    demand = rank_demand(resources)
    ranks = f"{resources.workers} ranks with " if resources.workers > 1 else ""
    asked = ", ".join(f"{amount:g} {name}" for name, amount in demand.items())
    largest = {name: max((m.get(name, 0.0) for m in capacity.machines), default=0.0) for name in demand}
    has = ", ".join(f"{amount:g} {name}" for name, amount in largest.items())
    total = ", ".join(f"{capacity.total.get(name, 0.0):g} {name}" for name in demand)
    where = (
        "the machine has" if len(capacity.machines) == 1 else f"the largest of {len(capacity.machines)} machines has"
    )
    both = "" if len(capacity.machines) == 1 else f" (all together {total})"
    return f"{node} asks for {ranks}{asked}{' each' if ranks else ''}; {where} {has}{both}"


def infeasible(problems: Sequence[str]) -> InfeasibleError:
    """The error for some answers of :func:`misfit`."""
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return InfeasibleError(
        f"{problems[0]}{more}.",
        "Lower the stage's resources (a profile, or --set stages.NAME.resources.cpus=1), or choose a larger cluster.",
    )


def require_fit(wanted: Sequence[tuple[str, Resources]], capacity: Capacity) -> None:
    """Raise InfeasibleError that names the first node which can never run."""
    problems = [problem for node, resources in wanted if (problem := misfit(node, resources, capacity))]
    if problems:
        raise infeasible(problems)
