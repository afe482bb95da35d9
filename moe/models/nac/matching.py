"""Minimum-cost matching of nodes to the rows of a block model.

The rows of a block model with k equal clusters are k distinct vectors, each n/k times. So the matching is a transport
problem: put n nodes into k clusters of n/k places. Start from a good guess and move nodes along negative cycles of the
k x k graph of cheapest single moves until there is none, which is the optimality criterion of minimum-cost flow. Costs
come from one matrix product instead of an n x n x n tensor of differences.

Shapes: n nodes, k clusters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe.errors import SpecError

Costs = npt.NDArray[np.float64]
Clusters = npt.NDArray[np.int64]

TOLERANCE = 1e-13
"""Relative gain below which a cycle counts as rounding."""


def row_costs(target_kn: Costs, rows_nn: Costs) -> Costs:
    """Mean squared difference of every target row and every given row, ``[k, n]``, in float64."""
    product = target_kn @ rows_nn.T
    squares = (target_kn**2).sum(1)[:, None] + (rows_nn**2).sum(1)[None, :]
    costs: Costs = (squares - 2 * product) / target_kn.shape[1]
    return costs


def transport(cost_kn: Costs) -> Clusters:
    """The cluster of each node that minimises the total cost with equally many nodes in every cluster.

    Args:
        cost_kn: cost of putting node i into cluster c; n is a multiple of k.

    Returns:
        int64 ``[n]``.

    Raises:
        SpecError: n is not a multiple of k, or a cost is not finite.
    """
    k, n = cost_kn.shape
    if n % k:
        raise SpecError(f"{n} nodes cannot be shared equally by {k} clusters.")
    if not np.isfinite(cost_kn).all():
        raise SpecError("The costs of the matching are not all finite; signatures or bandwidths have diverged.")
    cluster = _by_regret(cost_kn)
    slack = TOLERANCE * max(1e-300, float(np.abs(cost_kn).max()))
    while _improve(cost_kn, cluster, slack):
        pass
    return cluster


def _by_regret(cost_kn: Costs) -> Clusters:
    """Nodes with most to lose choose first among the clusters that have places left."""
    k, n = cost_kn.shape
    cluster = np.full(n, -1, dtype=np.int64)
    places = np.full(k, n // k)
    if k == 1:
        return np.zeros(n, dtype=np.int64)
    two = np.partition(cost_kn, 1, axis=0)
    for node in np.argsort(two[0] - two[1], kind="stable"):
        for choice in np.argsort(cost_kn[:, node], kind="stable"):
            if places[choice]:
                cluster[node], places[choice] = choice, places[choice] - 1
                break
    return cluster


def _improve(cost_kn: Costs, cluster: Clusters, slack: float) -> bool:
    """Move nodes around one negative cycle, in place; False when there is none."""
    k, n = cost_kn.shape
    gain = cost_kn - cost_kn[cluster, np.arange(n)]
    best, node = np.full((k, k), np.inf), np.zeros((k, k), dtype=np.int64)
    for source in range(k):
        members = np.flatnonzero(cluster == source)
        cheapest = gain[:, members].argmin(axis=1)
        node[source] = members[cheapest]
        best[source] = gain[np.arange(k), node[source]]
    np.fill_diagonal(best, 0.0)
    cycle = _negative_cycle(best, slack)
    for place, source in enumerate(cycle):
        target = cycle[(place + 1) % len(cycle)]
        cluster[node[source, target]] = target
    return bool(cycle)


def _negative_cycle(weight_kk: Costs, slack: float) -> list[int]:
    """Clusters along a cycle of weight below ``-slack``; empty when there is none (Bellman-Ford)."""
    k = len(weight_kk)
    distance, parent = np.zeros(k), np.full(k, -1)
    for _ in range(k):
        through = distance[:, None] + weight_kk
        source = through.argmin(axis=0)
        shorter = through.min(axis=0)
        changed = shorter < distance - slack / k
        if not changed.any():
            return []
        parent[changed], distance[changed] = source[changed], shorter[changed]
    walk = int(np.flatnonzero(changed)[0])
    for _ in range(k):
        walk = int(parent[walk])
    cycle = [walk]
    while (walk := int(parent[walk])) != cycle[0]:
        cycle.append(walk)
    return cycle[::-1]
