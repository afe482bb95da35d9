"""Louvain communities of a dense weighted graph, given as a matrix.

Co-activation graphs are nearly complete, so a row of the matrix is all a node needs to see: one sweep over n nodes
costs n vector operations, where an adjacency dictionary costs n^2 interpreted steps and minutes to build.

Sources: Blondel et al., "Fast unfolding of communities in large networks" (J. Stat. Mech. P10008, 2008); resolution as
in Lambiotte, Delvenne, Barahona (arXiv 0812.1770).

Parity: the draws of the python-louvain package (0.16), which the public code of MoE Jetpack calls with random state 42:
nodes and candidate communities are visited in shuffled order, and a level ends when modularity gains less than 1e-7.
That modularity multiplies the inner weight by the resolution, as the package does; moves follow Lambiotte et al.

Shapes: n nodes, c communities.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]

MIN_GAIN = 1e-7


def louvain(weights_nn: Matrix, resolution: float, seed: int) -> Labels:
    """Community of every node, numbered by first appearance.

    Args:
        weights_nn: symmetric, non-negative edge weights; the diagonal counts as twice the weight of a loop.
        resolution: more makes more communities; 1 is plain modularity.
        seed: of the visiting orders.
    """
    draws = np.random.RandomState(seed)
    graph = np.array(weights_nn, dtype=np.float64)
    if not graph.any():
        return np.arange(len(graph))
    local, best = _level(graph, resolution, draws)
    labels = local
    while True:
        member_nc = np.eye(local.max() + 1)[local]
        graph = member_nc.T @ graph @ member_nc
        local, gained = _level(graph, resolution, draws)
        if gained - best < MIN_GAIN:
            return labels
        labels, best = by_first_appearance(local[labels]), gained


def by_first_appearance(labels: Labels) -> Labels:
    """The same parts, numbered in the order of their lowest node."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    ranked: Labels = rank[inverse]
    return ranked


def _level(graph: Matrix, resolution: float, draws: np.random.RandomState) -> tuple[Labels, float]:
    """Move nodes between communities until nothing gains; the labels and their modularity."""
    nodes = len(graph)
    degrees = graph.sum(axis=1)
    total = degrees.sum()  # twice the weight of all edges
    links = graph.copy()
    np.fill_diagonal(links, 0.0)
    linked = links > 0
    labels = np.arange(nodes)
    mass = degrees.copy()  # degrees by community
    current = _quality(graph, labels, resolution)
    while True:
        moved = False
        order = np.arange(nodes)
        draws.shuffle(order)
        for node in order:
            own = labels[node]
            candidates = _neighbours(labels[linked[node]])
            draws.shuffle(candidates)
            pull = np.bincount(labels, weights=links[node], minlength=nodes)
            share = degrees[node] / total
            mass[own] -= degrees[node]
            stay = resolution * mass[own] * share - pull[own]
            gains = stay + pull[candidates] - resolution * mass[candidates] * share
            best = int(gains.argmax()) if len(gains) else -1
            chosen = candidates[best] if best >= 0 and gains[best] > 0 else own
            labels[node] = chosen
            mass[chosen] += degrees[node]
            moved = moved or chosen != own
        before, current = current, _quality(graph, labels, resolution)
        if not moved or current - before < MIN_GAIN:
            return by_first_appearance(labels), current


def _neighbours(labels: Labels) -> Labels:
    """Communities in the order in which a node's neighbours show them."""
    found, first = np.unique(labels, return_index=True)
    ordered: Labels = found[np.argsort(first)]
    return ordered


def _quality(graph: Matrix, labels: Labels, resolution: float) -> float:
    """Modularity, the inner weight times the resolution."""
    member_nc = np.eye(labels.max() + 1)[labels]
    inner = np.einsum("nc,nm,mc->c", member_nc, graph, member_nc, optimize=True)
    total = graph.sum()
    outer = (member_nc.T @ graph.sum(axis=1)) / total
    return float((resolution * inner / total - outer**2).sum())
