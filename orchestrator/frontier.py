"""Which nodes may run: dependencies, ``min_success`` of fan-outs, and the order of the ready ones. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from orchestrator.cache import InputDigest
from orchestrator.graph import Graph, Node
from orchestrator.policies import enough


@dataclass(frozen=True)
class Inputs:
    """What arrives at a node.

    Attributes:
        digests: port -> (member, digest) of what succeeded.
        left_out: port -> members that failed and are tolerated.
        missing: why the node cannot run; empty when it can.
    """

    digests: Mapping[str, tuple[InputDigest, ...]]
    left_out: Mapping[str, tuple[str, ...]]
    missing: str = ""


def ranks(graph: Graph) -> dict[str, float]:
    """Weight of the heaviest chain that begins at each node: the longest goes first."""
    rank: dict[str, float] = {}
    for name in reversed(list(graph.nodes)):
        after = max((rank[child] for child in graph.children[name]), default=0.0)
        rank[name] = graph.nodes[name].member.weight + after
    return rank


@dataclass
class Frontier:
    """Progress through a graph.

    Attributes:
        graph: the graph.
        artifacts: node -> digest of what succeeded.
        failed: nodes that failed or were skipped.
    """

    graph: Graph
    artifacts: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    _open: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._open = {name: len(node.parents) for name, node in self.graph.nodes.items()}

    def sources(self) -> list[str]:
        """Nodes that read nothing."""
        return [name for name, count in self._open.items() if count == 0]

    def settle(self, name: str, digest: str | None) -> list[str]:
        """Note that a node succeeded (with its digest) or failed (None); return the nodes that can be decided now."""
        if digest is None:
            self.failed.add(name)
        else:
            self.artifacts[name] = digest
        ready = []
        for child in self.graph.children[name]:
            self._open[child] -= 1
            if self._open[child] == 0:
                ready.append(child)
        return ready

    def waits_only_for(self, busy: Container[str], name: str) -> bool:
        """Whether all open parents of ``name`` are among ``busy``."""
        return sum(parent in busy for parent in self.graph.nodes[name].parents) == self._open[name]

    @property
    def settled(self) -> int:
        """Nodes that succeeded, failed or were skipped."""
        return len(self.artifacts) + len(self.failed)

    def inputs(self, name: str) -> Inputs:
        """What arrives at a node all of whose parents are settled."""
        node = self.graph.nodes[name]
        ports = self.graph.stages[node.stage].stage.inputs
        digests: dict[str, tuple[InputDigest, ...]] = {}
        left_out: dict[str, tuple[str, ...]] = {}
        for port, parents in node.inputs.items():
            lost = [parent for parent in parents if parent in self.failed]
            if lost and not (ports[port].many and all(self.group_done(self.graph.nodes[parent]) for parent in lost)):
                return Inputs({}, {}, f"needs {lost[0]}, which failed")
            digests[port] = tuple(
                (self.graph.nodes[parent].name, self.artifacts[parent])
                for parent in parents
                if parent in self.artifacts
            )
            if lost:
                left_out[port] = tuple(self.graph.nodes[parent].name for parent in lost)
        return Inputs(digests, left_out)

    def group_done(self, node: Node) -> bool:
        """Whether the fan-out of ``node`` (its stage, for its seed) has succeeded often enough."""
        return self._groups()[(node.stage, node.seed_index)]

    def _groups(self) -> dict[tuple[str, int | None], bool]:
        counts: dict[tuple[str, int | None], list[int]] = {}
        for name, node in self.graph.nodes.items():
            count = counts.setdefault((node.stage, node.seed_index), [0, 0])
            count[0] += name in self.artifacts
            count[1] += 1
        stages = self.graph.spec.stages
        return {group: enough(good, all_, stages[group[0]].min_success) for group, (good, all_) in counts.items()}

    def succeeded(self) -> bool:
        """Whether every fan-out has succeeded often enough."""
        return all(self._groups().values())
