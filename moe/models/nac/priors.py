"""Graph priors: random graphs by name, drawn by networkx.

The mediators' initial signatures are fitted to such a graph (``moe.models.nac.signatures``), so that at the start only
linked mediators hear each other. A seed fixes the draw under one networkx version.

Known differences: none for a given seed (golden vectors); the official code draws without one, on every rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.errors import EnvironmentProblem, SpecError, nearest
from moe.models.nac.graph_specs import PRIOR_NEEDS


@dataclass(frozen=True)
class Prior:
    """How networkx draws one kind of graph.

    Attributes:
        generator: name of the networkx function.
        arguments: names of its arguments.
        seeded: whether it is random.
        required: arguments without a default.
    """

    generator: str
    arguments: tuple[str, ...]
    seeded: bool
    required: tuple[str, ...]


PRIORS: dict[str, Prior] = {
    "barabasi-albert": Prior("barabasi_albert_graph", ("n", "m"), True, PRIOR_NEEDS["barabasi-albert"]),
    "scale-free": Prior("barabasi_albert_graph", ("n", "m"), True, PRIOR_NEEDS["scale-free"]),
    "planted-partition": Prior(
        "planted_partition_graph", ("l", "k", "p_in", "p_out"), True, PRIOR_NEEDS["planted-partition"]
    ),
    "ring-of-cliques": Prior("ring_of_cliques", ("num_cliques", "clique_size"), False, PRIOR_NEEDS["ring-of-cliques"]),
    "erdos-renyi": Prior("erdos_renyi_graph", ("n", "p"), True, PRIOR_NEEDS["erdos-renyi"]),
    "watts-strogatz": Prior("watts_strogatz_graph", ("n", "k", "p"), True, PRIOR_NEEDS["watts-strogatz"]),
    "grid-graph": Prior("grid_graph", ("dim", "periodic"), False, PRIOR_NEEDS["grid-graph"]),
    "balanced-tree": Prior("balanced_tree", ("r", "h"), False, PRIOR_NEEDS["balanced-tree"]),
    "barbell": Prior("barbell_graph", ("m1", "m2"), False, PRIOR_NEEDS["barbell"]),
    "hypercube": Prior("hypercube_graph", ("n",), False, PRIOR_NEEDS["hypercube"]),
    "complete": Prior("complete_graph", ("n",), False, PRIOR_NEEDS["complete"]),
}
"""Graph priors by their names in the configurations."""


def graph_adjacency(name: str, num_latents: int, kwargs: Mapping[str, Any] | None = None, seed: int = 0) -> Tensor:
    """The adjacency of a graph prior.

    Args:
        name: a key of :data:`PRIORS`.
        num_latents: nodes; the value of ``n`` where ``kwargs`` leaves it out.
        kwargs: arguments of the networkx generator; ``seed`` among them wins over ``seed``.
        seed: of the draw.

    Returns:
        int64 ``[n, n]`` of 0 and 1 without self-loops, nodes in the generator's order. A hypercube's ``n`` is its
        dimension: 8, or what ``num_latents`` is two to the power of.

    Raises:
        SpecError: unknown prior, missing or unknown arguments, or values that networkx refuses.
        EnvironmentProblem: networkx is not installed.
    """
    if name not in PRIORS:
        raise SpecError(f"There is no graph prior named {name!r}.", nearest(name, PRIORS))
    prior, given = PRIORS[name], dict(kwargs or {})
    drawn = given.pop("seed", seed)
    unknown = [key for key in given if key not in prior.arguments]
    missing = [key for key in prior.required if key not in given]
    if unknown or missing:
        raise SpecError(
            f"The graph prior {name!r} takes {', '.join(prior.arguments)}; unknown: {unknown}, missing: {missing}."
        )
    if name == "hypercube":
        given.setdefault("n", num_latents.bit_length() - 1 if num_latents & (num_latents - 1) == 0 else 8)
    elif "n" in prior.arguments:
        given.setdefault("n", num_latents)
    elif name == "barbell":
        given.setdefault("m2", 0)
    networkx = _networkx()
    try:
        graph = getattr(networkx, prior.generator)(**given, **({"seed": drawn} if prior.seeded else {}))
    except (networkx.NetworkXError, TypeError, ValueError) as error:
        raise SpecError(f"networkx cannot make the graph prior {name!r} with {given}: {error}") from None
    index = {node: place for place, node in enumerate(graph)}
    adjacency = torch.zeros(len(index), len(index), dtype=torch.int64)
    for a, b in graph.edges:
        adjacency[index[a], index[b]] = adjacency[index[b], index[a]] = 1
    return adjacency


def _networkx() -> ModuleType:
    try:
        return importlib.import_module("networkx")
    except ImportError:
        raise EnvironmentProblem("Graph priors need networkx.", "pip install networkx") from None
