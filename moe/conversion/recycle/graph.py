"""Co-activation graphs: partition a layer's neurons into parts that fire together.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2 (graph-partitioning sampling). METIS comes from the optional
package pymetis (extra ``graph``), spectral clustering from scikit-learn, Louvain from
:mod:`moe.conversion.recycle.louvain`.

Differs: the matrix goes to METIS as one CSR graph; the public code builds a networkx graph edge by edge and adjacency
lists from it, which gives the same parts at many times the cost.

Shapes: n neurons, q parts.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.conversion.recycle.louvain import by_first_appearance, louvain
from moe.conversion.recycle.options import GraphOptions
from moe.errors import DataError, EnvironmentProblem, SpecError

LOUVAIN_SEED = 42
SPECTRAL_SEED = 0
METIS_BUDGET = 1 << 30
"""METIS adds edge weights in 32-bit integers; weights are kept so small that no sum overflows."""


def partition(co_act_nn: Tensor, options: GraphOptions | None = None) -> Tensor:
    """Part of every neuron: int64 ``[n]``, parts numbered in the order of their lowest neuron.

    Args:
        co_act_nn: symmetric, non-negative co-activation ``[n, n]``; METIS and Louvain ignore the diagonal.
        options: partitioner; METIS into 32 parts of the unweighted graph by default.

    Raises:
        DataError: the matrix is not square, symmetric, finite and non-negative, or has no edge.
        SpecError: more parts than neurons.
        EnvironmentProblem: METIS is asked for but pymetis is not installed.
    """
    chosen = options or GraphOptions()
    matrix = _checked(co_act_nn)
    if chosen.method != "louvain" and chosen.parts > len(matrix):
        raise SpecError(
            f"{chosen.parts} parts cannot be made of {len(matrix)} neurons.", "Use fewer parts (option graph.parts)."
        )
    labels = {"metis": _metis, "louvain": _louvain, "spectral": _spectral}[chosen.method](matrix, chosen)
    return torch.from_numpy(by_first_appearance(np.asarray(labels, dtype=np.int64)))


def part_probabilities(co_act_nn: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much of the co-activation lies inside each part.

    Args:
        co_act_nn: co-activation ``[n, n]``; the diagonal is ignored.
        labels_n: a label per neuron, any integers.

    Returns:
        ``ids_q``: labels in the order of their lowest neuron; ``sizes_q``: neurons of each; ``prob_q``: float32 share
        of the co-activation inside parts, all zero when there is none.

    Raises:
        DataError: sizes do not fit.
    """
    matrix = _checked(co_act_nn, edges=False)
    labels = labels_n.cpu().numpy()
    if labels.shape != (len(matrix),):
        raise DataError(f"There are labels of shape {labels.shape} for a co-activation of shape {matrix.shape}.")
    ranked = by_first_appearance(labels)
    _, first = np.unique(ranked, return_index=True)
    inner = _inner_weights(matrix, ranked)
    total = inner.sum()
    prob = inner / total if total > 0 else np.zeros_like(inner)
    sizes = np.bincount(ranked)
    return torch.from_numpy(labels[first]), torch.from_numpy(sizes), torch.from_numpy(prob.astype(np.float32))


def modularity(co_act_nn: Tensor, labels_n: Tensor) -> float:
    """Weighted modularity of a partition at resolution 1, in [-0.5, 1]; self loops are left out.

    Raises:
        DataError: as :func:`partition`.
    """
    matrix = _checked(co_act_nn)
    np.fill_diagonal(matrix, 0.0)
    ranked = by_first_appearance(labels_n.cpu().numpy())
    degrees = np.bincount(ranked, weights=matrix.sum(axis=1))
    total = matrix.sum()
    return float((_inner_weights(matrix, ranked) / total - (degrees / total) ** 2).sum())


def _inner_weights(matrix: NDArray[np.float64], ranked: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum over ordered pairs i != j inside each part."""
    order = np.argsort(ranked, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(ranked))])
    blocks = (order[a:b] for a, b in itertools.pairwise(starts))
    return np.array([matrix[np.ix_(block, block)].sum() - matrix[block, block].sum() for block in blocks])


def _metis(matrix: NDArray[np.float64], options: GraphOptions) -> Any:
    try:
        import pymetis
    except ImportError as error:
        raise EnvironmentProblem(
            "Graph partitioning by METIS needs the package pymetis, which is not installed.",
            "Install it: pip install 'moepipe[graph]'. Or choose louvain or spectral (option graph.method).",
        ) from error
    edges = matrix > 0
    np.fill_diagonal(edges, False)
    kind = pymetis.zero_copy_dtype()
    starts = np.concatenate([[0], np.cumsum(edges.sum(axis=1))]).astype(kind)
    targets = np.nonzero(edges)[1].astype(kind)
    weights = None if options.weights == "none" else _edge_weights(matrix[edges], options.weights).astype(kind)
    graph = pymetis.CSRAdjacency(adj_starts=starts, adjacent=targets)
    return pymetis.part_graph(options.parts, graph, eweights=weights)[1]


def _edge_weights(values: NDArray[np.float64], how: str) -> NDArray[np.int64]:
    """Integers for METIS. Truncation may give 0: METIS takes that, and the public code does it."""
    if how == "scaled":
        scale = max(METIS_BUDGET - len(values), 0) / values.sum()
        spread: NDArray[np.int64] = 1 + np.floor(values * scale).astype(np.int64)
        return spread
    whole: NDArray[np.int64] = values.astype(np.int64)
    if whole.sum() > METIS_BUDGET:
        raise DataError(
            f"Co-activation adds up to {values.sum():.3g}, more than METIS' integers can add.",
            "Use weights='scaled' (option graph.weights).",
        )
    return whole


def _louvain(matrix: NDArray[np.float64], options: GraphOptions) -> NDArray[np.int64]:
    np.fill_diagonal(matrix, 0.0)
    return louvain(matrix, options.resolution, LOUVAIN_SEED if options.seed is None else options.seed)


def _spectral(matrix: NDArray[np.float64], options: GraphOptions) -> Any:
    from sklearn.cluster import SpectralClustering

    seed = SPECTRAL_SEED if options.seed is None else options.seed
    clustering = SpectralClustering(
        n_clusters=options.parts, affinity="precomputed", n_init=options.trials, random_state=seed
    )
    return clustering.fit_predict(matrix)


def _checked(co_act_nn: Tensor, edges: bool = True) -> NDArray[np.float64]:
    """A float64 copy of a proper co-activation matrix."""
    matrix = np.array(co_act_nn.detach().cpu(), dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise DataError(f"A co-activation matrix is square, but this one has shape {matrix.shape}.")
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        raise DataError(f"The co-activation matrix {matrix.shape} holds negative or non-finite values.")
    if not np.allclose(matrix, matrix.T):
        raise DataError(f"The co-activation matrix {matrix.shape} is not symmetric.")
    if edges and not (matrix.sum() - np.trace(matrix)) > 0:
        raise DataError(
            f"No two of the {len(matrix)} neurons are ever active together: there is no graph to partition.",
            "Collect more images, lower the threshold, or select by another statistic.",
        )
    return matrix
