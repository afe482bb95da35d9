"""In which order ready nodes start: the longest first, by what their inputs say and not only by what the YAML does.

How many rows an expert is trained on is known when the split has run, so a stage may weigh its members again at the
moment when they become ready (:meth:`orchestrator.stages.base.StageBase.weigh`). The order decides how long a run takes
and never what it computes, so nothing of this enters a cache key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.errors import NotFoundError
from orchestrator.frontier import Inputs, ranks
from orchestrator.graph import Graph
from orchestrator.stages.base import StageBase
from orchestrator.store import Store


class Ranks:
    """Weight of the heaviest chain that begins at each node.

    Args:
        graph: the graph.
        store: where the records of arriving artifacts are read.
    """

    def __init__(self, graph: Graph, store: Store) -> None:
        self._graph, self._store = graph, store
        self._rank = ranks(graph)
        self._metas: dict[str, Mapping[str, Any]] = {}

    def __getitem__(self, name: str) -> float:
        return self._rank[name]

    def arrive(self, name: str, inputs: Inputs) -> None:
        """The inputs of a node are known; doing it twice (after a retry) changes nothing."""
        node = self._graph.nodes[name]
        stage = self._graph.stages[node.stage].stage
        if type(stage).weigh is StageBase.weigh:
            return  # reading records costs a round trip each in a remote store
        try:
            metas = {port: [self._meta(digest) for _, digest in items] for port, items in inputs.digests.items()}
        except NotFoundError:
            return  # the member that needs the artifact says so itself
        after = max((self._rank[child] for child in self._graph.children[name]), default=0.0)
        self._rank[name] = stage.weigh(node.config, node.member, metas) + after

    def _meta(self, digest: str) -> Mapping[str, Any]:
        if digest not in self._metas:
            self._metas[digest] = self._store.artifact(digest).meta
        return self._metas[digest]
