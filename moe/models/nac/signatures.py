"""Signatures fitted to a graph: linked nodes nearer than the cut-off, all others farther.

From an orthogonal start, Adam moves all signatures together so that the cosine distance d of linked pairs falls below
``truncation`` and that of other pairs rises above it (hinge), or so that d follows the graph's shortest paths (mse).

``Differs:`` the fit is seeded; the official one is not and repeats on every rank.

Shapes: n nodes, Z signature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.kernel import cosine_distance
from moe.models.nac.priors import graph_adjacency

FIT_OPTIONS = ("truncation", "num_iters", "learning_rate", "loss")


@dataclass(frozen=True)
class SignatureFit:
    """Signatures and how well they render the graph.

    Attributes:
        signatures: ``[n, Z]``, float32.
        score: hinge: share of pairs on the wrong side of the cut-off; mse: the loss at the end.
        adjacency: the graph, int64 ``[n, n]``.
    """

    signatures: Tensor
    score: float
    adjacency: Tensor


def orthogonal_signatures(count: int, dim: int, seed: int = 0) -> Tensor:
    """The start of a fit: rows or columns orthonormal, ``[n, Z]``."""
    generator = torch.Generator().manual_seed(seed)
    return nn.init.orthogonal_(torch.empty(count, dim), generator=generator)


def fit_signatures(
    adjacency: Tensor,
    initial: Tensor,
    *,
    truncation: float = 0.8,
    num_iters: int = 1000,
    learning_rate: float = 1e-3,
    loss: Literal["hinge", "mse"] = "hinge",
) -> SignatureFit:
    """Fit signatures to a graph by full-batch Adam (betas 0.9 and 0.999, eps 1e-8).

    Args:
        adjacency: ``[n, n]`` of 0 and 1.
        initial: ``[n, Z]``.
        truncation: cosine distance that separates linked pairs from others (hinge).
        num_iters: steps.
        learning_rate: Adam's.
        loss: ``hinge`` or ``mse``.

    Raises:
        SpecError: shapes don't fit, or an unknown loss.
    """
    n = adjacency.shape[0]
    if adjacency.shape != (n, n) or initial.ndim != 2 or initial.shape[0] != n:
        raise SpecError(f"A graph of {tuple(adjacency.shape)} and signatures of {tuple(initial.shape)} don't fit.")
    if loss not in ("hinge", "mse"):
        raise SpecError(f"There is no signature loss named {loss!r}.", "Allowed: hinge, mse.")
    objective = _Hinge(adjacency, truncation, initial) if loss == "hinge" else _PathError(adjacency, initial)
    signatures = initial.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([signatures], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(num_iters):
            optimizer.zero_grad()
            objective(cosine_distance(signatures, signatures)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    final = signatures.detach()
    return SignatureFit(final, float(objective.score(cosine_distance(final, final))), adjacency)


class _Hinge:
    """Mean over all pairs of ``max(t, d)`` where linked, ``max(-t, -d)`` elsewhere (diagonal included)."""

    def __init__(self, adjacency: Tensor, truncation: float, like: Tensor) -> None:
        self.adjacency, self.truncation = adjacency.to(like.device), truncation
        self.sign = (2 * self.adjacency - 1).to(like.dtype)
        self.floor = self.sign * truncation

    def __call__(self, d: Tensor) -> Tensor:
        return torch.maximum(self.floor, self.sign * d).mean()

    def score(self, d: Tensor) -> Tensor:
        near = (d < self.truncation).to(torch.int64)
        eye = torch.eye(d.shape[0], dtype=torch.int64, device=d.device)
        return (near - eye - self.adjacency).abs().to(d.dtype).mean()


class _PathError:
    """Mean squared difference of d and shortest path lengths over their largest; no path counts as 0."""

    def __init__(self, adjacency: Tensor, like: Tensor) -> None:
        from scipy.sparse.csgraph import shortest_path

        lengths = torch.from_numpy(shortest_path(adjacency.cpu().numpy(), unweighted=True, directed=False))
        lengths = torch.where(lengths.isinf(), 0.0, lengths)
        self.target = (lengths / lengths.max().clamp_min(1)).to(like)

    def __call__(self, d: Tensor) -> Tensor:
        return (d - self.target).square().mean()

    def score(self, d: Tensor) -> Tensor:
        return self(d)


def prior_signatures(
    name: str, num_latents: int, signature_dim: int, kwargs: Mapping[str, Any] | None = None, seed: int = 0
) -> SignatureFit:
    """Signatures of a graph prior: draw the graph, fit signatures to it.

    Args:
        name: a graph prior, see ``moe.models.nac.priors``; ``complete`` gives every latent the same signature.
        num_latents: nodes n.
        signature_dim: width Z.
        kwargs: arguments of the graph generator and of :func:`fit_signatures` (``truncation``, ``num_iters``,
            ``learning_rate``, ``loss``).
        seed: of the graph and of the start.

    Raises:
        SpecError: the graph has another number of nodes than there are latents; wrong arguments.
    """
    given = dict(kwargs or {})
    options = {key: given.pop(key) for key in FIT_OPTIONS if key in given}
    adjacency = graph_adjacency(name, num_latents, given, seed)
    if adjacency.shape[0] != num_latents:
        raise SpecError(
            f"The graph prior {name!r} with {given} has {adjacency.shape[0]} nodes for {num_latents} latents.",
            "Make the product of its sizes equal to the number of latents.",
        )
    if name == "complete":
        one = torch.randn(1, signature_dim, generator=torch.Generator().manual_seed(seed))
        return SignatureFit(one.repeat(num_latents, 1), 0.0, adjacency)
    return fit_signatures(adjacency, orthogonal_signatures(num_latents, signature_dim, seed), **options)
