"""Node of the graph -> :class:`Task`: plain data that a process on any machine can run."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.cache import member_seed
from orchestrator.executors.base import InputRef, Task
from orchestrator.executors.ray_life import stall_seconds
from orchestrator.frontier import Inputs
from orchestrator.graph import Graph, Node
from orchestrator.runs import Run
from orchestrator.stages.base import STAGES
from orchestrator.store import Key, Store


@dataclass(frozen=True)
class Place:
    """Where things of a run lie."""

    store: Store
    run: Run
    data_root: str


def make_task(graph: Graph, node: Node, key: Key, inputs: Inputs, attempt: int, place: Place, slots: int = 1) -> Task:
    """Everything that a process needs to run ``node``."""
    stage = graph.stages[node.stage].stage
    return Task(
        node=node.id,
        kind=node.kind,
        module=STAGES.module_name(node.kind),
        config=node.config.model_dump(mode="json"),
        member=node.member.name,
        params=dict(node.member.params),
        member_path=node.name,
        output=stage.output,
        seed=member_seed(node),
        key=key,
        inputs={port: tuple(InputRef(*item) for item in arriving) for port, arriving in inputs.digests.items()},
        left_out=inputs.left_out,
        resources=node.resources,
        gang=stage.gang,
        store=place.store.url,
        cache=str(place.store.folder),
        run=place.run.id,
        log=str(place.run.log_path(node.id)),
        data_root=place.data_root,
        attempt=attempt,
        weight=node.member.weight,
        leads=stage.leads,
        slots=slots,
        stall_s=stall_seconds(),
        retry=node.retry,
        kinds={kind: STAGES.module_name(kind) for kind in stage.kinds(node.config)},
    )
