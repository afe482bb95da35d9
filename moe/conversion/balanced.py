"""Balanced k-means: clusters of exactly equal size, by an exact minimum-cost assignment in every iteration.

Source: EMoE (arXiv 2310.10908) splits the neurons of a feed-forward layer with k-means-constrained (Bradley, Bennett
and Demiriz, "Constrained k-means clustering", 2000): k-means++ starts, an assignment that minimises the sum of integer
costs ``round(1000 * distance)`` under the size limits, means, until the centres rest; the best of several starts.

Differs: the optimum of an iteration is found by successive shortest paths on the graph of the E groups (from the
previous iteration's prices when sizes are equal) instead of a general network-flow solver. It is the same optimum;
where several labellings reach it, the one taken may differ.

Shapes: N points, D width, E groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import SpecError

Array = NDArray[Any]

COST_SCALE = 1000
"""Distances are rounded to this fraction of one before they are assigned, as in the official solver."""


@dataclass(frozen=True)
class Clustering:
    """A balanced clustering.

    Attributes:
        labels_N: int64, group of each point.
        centers_ED: float64, mean of each group.
        inertia: sum of squared distances of the points to their group's mean.
        iterations: assignments computed in the best start.
    """

    labels_N: Array
    centers_ED: Array
    inertia: float
    iterations: int


def balanced_kmeans(
    points_ND: Array,
    num_groups: int,
    *,
    seed: int = 0,
    restarts: int = 10,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Clustering:
    """Partition points into groups of exactly ``N / E`` that lie close together.

    Args:
        points_ND: float points; computed in float64.
        num_groups: E >= 1, a divisor of N.
        seed: of the k-means++ starts.
        restarts: starts; the best inertia wins, the earlier one on ties.
        max_iterations: most assignments of one start.
        tolerance: a start ends when the centres' squared shift is at most this times the mean variance of a feature.

    Raises:
        SpecError: E does not divide N, or a value is not finite.
    """
    points = np.asarray(points_ND, dtype=np.float64)
    _check_points(points, num_groups)
    limit = tolerance * float(points.var(axis=0).mean())
    stream = np.random.RandomState(seed)
    best: Clustering | None = None
    for start in stream.randint(np.iinfo(np.int32).max, size=max(1, restarts)):
        found = _one_start(points, num_groups, int(start), max_iterations, limit)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None  # for the type checker: there is at least one start
    return best


def assign(points_ND: Array, centers_ED: Array, size_min: int, size_max: int) -> tuple[Array, int]:
    """The cheapest assignment with between ``size_min`` and ``size_max`` points in every group.

    Args:
        points_ND: points.
        centers_ED: centres.
        size_min: least members of a group, >= 0.
        size_max: most members of a group.

    Returns:
        int64 labels ``[N]`` and their total cost, the sum of ``round(1000 * Euclidean distance)``.

    Raises:
        SpecError: no assignment satisfies the sizes, or a value is not finite.
    """
    points, centers = np.asarray(points_ND, np.float64), np.asarray(centers_ED, np.float64)
    count, groups = len(points), len(centers)
    if not 0 <= size_min <= size_max or not groups * size_min <= count <= groups * size_max:
        raise SpecError(
            f"{count} points cannot fill {groups} groups of {size_min} to {size_max} members.",
            f"Choose limits around {count / max(1, groups):.3g}.",
        )
    if not (np.isfinite(points).all() and np.isfinite(centers).all()):
        raise SpecError("Points or centres hold values that are not finite.", "Check the weights they come from.")
    costs = _costs(points, centers)
    if size_min == size_max:
        labels, _ = _assign_equal(costs, np.zeros(groups))
    else:
        labels = _assign_between(costs, size_min, size_max)
    return labels, int(costs[np.arange(count), labels].sum())


def inertia(points_ND: Array, labels_N: Array) -> float:
    """Sum of squared distances of points to the mean of their group, in float64."""
    points, labels = np.asarray(points_ND, np.float64), np.asarray(labels_N)
    return float(
        sum(((group - group.mean(0)) ** 2).sum() for e in np.unique(labels) for group in [points[labels == e]])
    )


def _check_points(points: Array, groups: int) -> None:
    if points.ndim != 2:
        raise SpecError(f"Points must be a matrix, not an array of shape {points.shape}.", "Give one row per point.")
    if groups < 1 or len(points) % groups or len(points) == 0:
        raise SpecError(
            f"{len(points)} neurons cannot be split into {groups} equal experts.",
            f"Choose a number of experts that divides {len(points)}.",
        )
    if not np.isfinite(points).all():
        raise SpecError("The keys hold values that are not finite.", "Check the weights they come from.")


def _one_start(points: Array, groups: int, seed: int, max_iterations: int, limit: float) -> Clustering:
    from sklearn.cluster import kmeans_plusplus

    centers, _ = kmeans_plusplus(points, groups, random_state=seed)
    prices = np.zeros(groups)
    labels = np.full(len(points), -1)
    iterations = 0
    for _ in range(max(1, max_iterations)):
        iterations += 1
        before, (labels, prices) = labels, _assign_equal(_costs(points, centers), prices)
        means = _means(points, labels, groups)
        shift = float(((means - centers) ** 2).sum())
        centers = means
        if shift <= limit or np.array_equal(before, labels):
            break
    value = float(((points - centers[labels]) ** 2).sum())
    return Clustering(labels, centers, value, iterations)


def _means(points: Array, labels: Array, groups: int) -> Array:
    """Means of groups of equal size."""
    order = np.argsort(labels, kind="stable")
    means: Array = points[order].reshape(groups, -1, points.shape[1]).mean(axis=1)
    return means


def _costs(points: Array, centers: Array) -> Array:
    """Integer costs ``[N, E]``, held in float64."""
    squares = (points**2).sum(1)[:, None] + (centers**2).sum(1) - 2 * points @ centers.T
    costs: Array = np.rint(COST_SCALE * np.sqrt(np.maximum(squares, 0)))
    return costs


def _assign_equal(costs: Array, prices: Array) -> tuple[Array, Array]:
    """Cheapest assignment into groups of equal size by successive shortest paths; and its prices.

    Each point first takes the group of least ``cost - price``, which is optimal for the sizes that it gives. Then one
    member after the other leaves an over-full group for one with room along the cheapest chain of moves, which keeps it
    optimal. Good prices leave few chains to do, hence the previous iteration's are a good start; any are correct.
    """
    count, groups = costs.shape
    target = count // groups
    labels: Array = (costs - prices).argmin(axis=1)
    load = np.bincount(labels, minlength=groups)
    step, who = np.full((groups, groups), np.inf), np.zeros((groups, groups), np.int64)

    def refresh(group: int) -> None:
        """Cheapest move of a member of ``group`` to each other group, and which member it is."""
        members = np.flatnonzero(labels == group)
        if members.size == 0:
            step[group] = np.inf
            return
        change = costs[members] - costs[members, group, None]
        first = change.argmin(axis=0)
        who[group] = members[first]
        step[group] = change[first, np.arange(groups)]

    for group in range(groups):
        refresh(group)
    while (load > target).any():
        distance, parent = _shortest(step, np.where(load > target, 0.0, np.inf))
        end = int(np.where(load < target, distance, np.inf).argmin())
        load[end] += 1
        touched = [end]
        while parent[end] >= 0:
            begin = int(parent[end])
            labels[who[begin, end]] = end
            touched.append(begin)
            end = begin
        load[end] -= 1
        for group in touched:
            refresh(group)
    return labels, _shortest(step, np.zeros(groups))[0]


def _shortest(step: Array, start: Array) -> tuple[Array, Array]:
    """Bellman-Ford over all groups at once: least distance of each and the group before it (-1 at a beginning)."""
    distance = start.copy()
    parent = np.full(len(start), -1)
    columns = np.arange(len(start))
    for _ in range(len(start)):
        through = distance[:, None] + step
        before = through.argmin(axis=0)
        value = through[before, columns]
        better = value < distance
        if not better.any():
            break
        parent[better] = before[better]
        distance[better] = value[better]
    return distance, parent


def _assign_between(costs: Array, size_min: int, size_max: int) -> Array:
    """Cheapest assignment under two limits, as a square assignment problem.

    Every group has ``size_min`` slots that must be filled and ``size_max - size_min`` that may stay empty: fillers take
    the latter for nothing and are kept out of the former.
    """
    from scipy.optimize import linear_sum_assignment

    count, groups = costs.shape
    slots = np.repeat(np.arange(groups), size_max)
    must = np.tile(np.arange(size_max) < size_min, groups)
    out_of_reach = (costs.max(initial=0) + 1) * (count + 1)
    fillers = np.where(must, out_of_reach, 0.0)
    square = np.vstack([costs[:, slots], np.tile(fillers, (len(slots) - count, 1))])
    _, columns = linear_sum_assignment(square)
    labels: Array = slots[columns[:count]]
    return labels
