"""The co-activation graph of a feed-forward layer's neurons, its partition by METIS, and equal groups made of it.

Source: MoEfication (arXiv 2110.01786, section 3.2): neurons that fire together belong together. Weights of edges count
batches of tokens in which both fired, cut at a threshold that is found from the distribution of all counts.

Shapes: F neurons, T tokens, D width, B tokens of a batch, E groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe.errors import EnvironmentProblem, SpecError


def coactivation_graph(
    keys_FD: Tensor,
    hidden_TD: Tensor,
    *,
    batch_size: int = 8,
    percentile_start: int = 10,
    percentile_step: int = 10,
    threshold_factor: float = 0.99,
) -> Tensor:
    """Symmetric int64 edge weights ``[F, F]``, 0 where there is no edge.

    In each full batch of consecutive tokens (a rest is dropped) neurons i and j count ``min(1, sum a_i a_j)`` with
    ``a = relu(hidden keys^T)``. The sums over batches are divided by ``threshold_factor`` times the first non-zero
    percentile of all F*F of them and rounded down.

    Args:
        keys_FD: first layer's weight; its bias is not used.
        hidden_TD: inputs of the layer.
        batch_size: tokens of a batch.
        percentile_start: first percentile looked at.
        percentile_step: distance to the next; 100 is the last.
        threshold_factor: the threshold is this part of the percentile.

    Raises:
        SpecError: widths that differ, fewer tokens than one batch, or values that are not finite.
    """
    if keys_FD.ndim != 2 or hidden_TD.ndim != 2 or keys_FD.shape[1] != hidden_TD.shape[1]:
        raise SpecError(
            f"Keys of shape {tuple(keys_FD.shape)} and inputs of shape {tuple(hidden_TD.shape)} do not fit.",
            "Expected [F, D] and [T, D].",
        )
    batches = hidden_TD.shape[0] // batch_size
    if batches == 0:
        raise SpecError(f"{hidden_TD.shape[0]} tokens do not fill one batch of {batch_size}.", "Give more tokens.")
    with torch.no_grad():
        fired_TF = (hidden_TD.float() @ keys_FD.float().t()).relu()
        if not bool(torch.isfinite(fired_TF).all()):
            raise SpecError("The activations are not finite.", "Check the weights and inputs.")
        adjacency = fired_TF.new_zeros(keys_FD.shape[0], keys_FD.shape[0])
        for fired_BF in torch.split(fired_TF[: batches * batch_size], batch_size):
            adjacency += (fired_BF.t() @ fired_BF).clamp_max_(1.0)
    threshold = _threshold(adjacency, percentile_start, percentile_step) * threshold_factor
    if threshold == 0:
        return torch.zeros_like(adjacency, dtype=torch.int64)
    edges = (adjacency / threshold).floor().to(torch.int64)
    # BLAS may sum i*j and j*i in another order, which at the edge of an integer would make the graph one-sided.
    edges = edges.triu(1)
    return edges + edges.t()


def _threshold(adjacency: Tensor, start: int, step: int) -> float:
    levels = range(start, 101, step)
    values = np.percentile(adjacency.numpy(), list(levels))
    found = values[values > 0]
    return float(found[0]) if found.size else 0.0


def partition_graph(edges_FF: Tensor, num_groups: int, seed: int = 0) -> Tensor:
    """Labels int64 ``[F]`` of a METIS partition that cuts little weight; groups are of similar, not equal, size.

    Raises:
        EnvironmentProblem: the extra ``graph`` is not installed.
        SpecError: the graph is not square.
    """
    try:
        import pymetis
    except ImportError as error:
        raise EnvironmentProblem(
            "The co-activation split needs METIS.", "Install it with: pip install 'moepipe[graph]'"
        ) from error
    if edges_FF.ndim != 2 or edges_FF.shape[0] != edges_FF.shape[1]:
        raise SpecError(f"The graph has shape {tuple(edges_FF.shape)}, expected a square matrix of edge weights.")
    if num_groups == 1:
        return torch.zeros(edges_FF.shape[0], dtype=torch.int64)
    rows, columns = edges_FF.nonzero(as_tuple=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=len(edges_FF)).cumsum(0)])
    _, labels = pymetis.part_graph(
        num_groups,
        xadj=starts.tolist(),
        adjncy=columns.tolist(),
        eweights=edges_FF[rows, columns].tolist(),
        options=pymetis.Options(seed=seed),
    )
    return torch.tensor(labels, dtype=torch.int64)


def rebalance(labels_F: Tensor, num_groups: int, generator: torch.Generator | None = None) -> Tensor:
    """Equal groups with the fewest moves: only over-full groups give members away, to those with room.

    Args:
        labels_F: int64, any sizes; groups may be empty.
        num_groups: E, a divisor of F.
        generator: draws which members leave; without one the last ones do.

    Raises:
        SpecError: E does not divide F, or a label is outside 0..E-1.
    """
    neurons = labels_F.shape[0]
    if num_groups < 1 or neurons % num_groups:
        raise SpecError(f"{neurons} neurons cannot be split into {num_groups} equal groups.")
    if neurons and (int(labels_F.min()) < 0 or int(labels_F.max()) >= num_groups):
        raise SpecError(f"Labels run from {int(labels_F.min())} to {int(labels_F.max())}, not 0 to {num_groups - 1}.")
    target = neurons // num_groups
    order = torch.arange(neurons) if generator is None else torch.randperm(neurons, generator=generator)
    sizes = torch.bincount(labels_F, minlength=num_groups)
    rank = torch.empty_like(labels_F)
    for group in range(num_groups):
        members = order[labels_F[order] == group]
        rank[members] = torch.arange(members.numel())
    leaving = order[rank[order] >= target]
    room = (target - sizes).clamp_min(0)
    result = labels_F.clone()
    result[leaving] = torch.arange(num_groups).repeat_interleave(room)
    return result
