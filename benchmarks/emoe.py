"""EMoE: the exact balanced assignment, and a converted feed-forward layer beside the dense one that it came from.

Baselines: scipy's ``linear_sum_assignment`` on one slot per place in a group (the same optimum); the dense two-layer
network of all neurons, which is also the limit.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.conversion.balanced import assign
from moe.conversion.split import DenseFFN, split_keys
from moe.models.emoe_blocks import ConvertedFFN
from moe.models.emoe_spec import EMoESpec

# Experts, chosen ones, and the largest ratio to the dense layer that is asked for.
SETTINGS = ((24, 4, 0.65), (64, 16, 1.15), (64, 32, 1.15))


def run(sizes: Sizes) -> list[Row]:
    """Rows of the table; ``sizes.quick`` runs them once on small shapes."""
    return [assignment_row(sizes), *(layer_row(sizes, *setting) for setting in SETTINGS)]


def assignment_row(sizes: Sizes) -> Row:
    """One assignment of a k-means iteration, from scratch."""
    neurons, width, groups = (192, 48, 16) if is_quick(sizes) else (1536, 384, 64)
    stream = np.random.RandomState(0)
    points = stream.randn(neurons, width)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centers = points[stream.permutation(neurons)[:groups]]
    size = neurons // groups

    def scipys() -> int:
        squares = (points**2).sum(1)[:, None] + (centers**2).sum(1) - 2 * points @ centers.T
        costs = np.rint(1000 * np.sqrt(np.maximum(squares, 0)))
        rows, columns = linear_sum_assignment(np.repeat(costs, size, axis=1))
        return int(costs[rows, columns // size].sum())

    if scipys() != assign(points, centers, size, size)[1]:
        raise AssertionError("The two assignments have different costs.")
    theirs, ours = alternate([scipys, lambda: assign(points, centers, size, size)], 1 if is_quick(sizes) else 5)
    return Row("emoe: exact balanced assignment", theirs, ours, None, f"{neurons} neurons, {groups} groups")


def layer_row(sizes: Sizes, experts: int, top_k: int, limit: float) -> Row:
    """Forward and backward of ViT-S' layer in training mode."""
    tokens, width = (64, 48) if is_quick(sizes) else (1576, 384)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    labels = split_keys(dense[0].weight, experts, "random")
    spec = EMoESpec(num_experts=experts, top_k=top_k)
    sparse = ConvertedFFN(DenseFFN.of(dense[0], dense[2]), labels, spec)
    x = torch.randn(tokens, width, requires_grad=True)

    def step(layer: nn.Module) -> Tensor:
        loss = layer(x).square().mean()
        torch.autograd.backward(loss)
        return loss

    slow, fast = alternate([lambda: step(dense), lambda: step(sparse)], 1 if is_quick(sizes) else 9)
    what = f"emoe: feed-forward layer, {top_k} of {experts} experts, beside dense"
    return Row(what, slow, fast, 1 / limit, f"{tokens} tokens, D {width}; at most {limit} x dense")


def is_quick(sizes: Sizes) -> bool:
    """Whether the tiny mode is asked for."""
    return sizes == Sizes.quick()
