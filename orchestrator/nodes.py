"""The expanded pipeline: nodes, stages and the graph that holds them (:func:`orchestrator.graph.build_graph`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.spec import PipelineSpec, Resources, Retry, StageSpec
from orchestrator.stages.base import Member, StageBase, StageConfig


def derive_seed(seed: int, stage: str, member: str) -> int:
    """The seed of one node, 0 .. 2^32-1: a function of the pipeline's seed and of names alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{member}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Node:
    """One member of one stage for one seed: what is scheduled, cached and retried.

    Attributes:
        id: ``experts/seed=0/group=2``; no ``seed=`` for stages over all seeds; the stage's name alone for a single.
        stage: stage name.
        kind: stage kind.
        member: its unit of the fan-out.
        seed: derived seed (:func:`derive_seed`); None for stages over all seeds.
        seed_index: the pipeline's seed, as the user wrote it; None likewise.
        config: validated config.
        resources: of one rank.
        retry: budgets by cause.
        timeout_s: seconds, or None.
        inputs: port -> ids of the nodes it reads, in listed and member order.
        seed_name: name from which the seed derives; empty: the stage's.
    """

    id: str
    stage: str
    kind: str
    member: Member
    seed: int | None
    seed_index: int | None
    config: StageConfig
    resources: Resources
    retry: Retry
    timeout_s: float | None
    inputs: Mapping[str, tuple[str, ...]]
    seed_name: str = ""

    @property
    def name(self) -> str:
        """The id without the stage, e.g. ``seed=0/group=2``; empty for a single one over all seeds."""
        return self.id[len(self.stage) + 1 :]

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of all nodes it reads, each once."""
        return tuple(dict.fromkeys(parent for ids in self.inputs.values() for parent in ids))


@dataclass(frozen=True)
class StageView:
    """One stage of the graph.

    Attributes:
        name: stage name.
        kind: stage kind.
        spec: as in the pipeline.
        stage: instance of the kind's class.
        config: validated config.
        inputs: port -> names of the stages it reads, in listed order.
        nodes: ids of its nodes: by seed, then by member.
    """

    name: str
    kind: str
    spec: StageSpec
    stage: StageBase[Any]
    config: StageConfig
    inputs: Mapping[str, tuple[str, ...]]
    nodes: tuple[str, ...]

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of all stages it reads, each once."""
        return tuple(dict.fromkeys(parent for names in self.inputs.values() for parent in names))


@dataclass(frozen=True)
class Graph:
    """The expanded pipeline.

    Attributes:
        spec: where it comes from.
        nodes: by id, in topological order.
        stages: by name, in topological order.
    """

    spec: PipelineSpec
    nodes: Mapping[str, Node]
    stages: Mapping[str, StageView]

    @cached_property
    def children(self) -> Mapping[str, tuple[str, ...]]:
        """Node id -> ids of the nodes that read it."""
        out: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for parent in node.parents:
                out[parent].append(node.id)
        return {name: tuple(ids) for name, ids in out.items()}

    def stage_children(self, stage: str) -> tuple[str, ...]:
        """Names of the stages that read ``stage``."""
        return tuple(view.name for view in self.stages.values() if stage in view.parents)
