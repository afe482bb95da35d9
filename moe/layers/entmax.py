"""Entmax 1.5: a softmax whose small probabilities are exactly zero.

``p_i = max(z_i - t, 0)^2`` with ``z = x / 2`` and the threshold ``t`` that makes the sum 1 (Peters et al. 2019, arXiv
1905.05702, equation 13). The usual algorithm sorts each row. Here t is found by Newton's method on
``g(t) = |max(z - t, 0)|_2 - 1``, which is convex and falls almost linearly: started left of the root it climbs to it
without overshooting and is exact to rounding after six steps. The backward pass needs the result alone.

Known differences: none in the numbers (within 1e-6 of the exact sorted solution). Differs: any floating type, any
dimension, entries of minus infinity and derivatives of every order are supported.

Shapes: R rows, n entries of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.errors import SpecError

_CHUNK = 1 << 17
"""Entries per piece on a CPU: all passes of Newton's method then find the piece in the cache."""


def entmax15(x: Tensor, dim: int = -1) -> Tensor:
    """Entmax with alpha = 1.5 along ``dim``.

    Args:
        x: scores of any floating type and shape; at least one entry along ``dim``. ``-inf`` masks an entry.
        dim: the dimension whose entries sum to 1 afterwards.

    Returns:
        Probabilities of the shape and type of ``x`` (computed in float32 or wider), with exact zeros outside the
        support. A row that holds NaN or +inf, or nothing but -inf, becomes NaN, as with softmax. Differentiable to any
        order.

    Raises:
        SpecError: no entries along ``dim``, or not a floating type.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[dim] == 0:
        raise SpecError(
            f"entmax15 needs floating-point scores with at least one entry along dimension {dim}; "
            f"this is {x.dtype} of shape {tuple(x.shape)}."
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide).movedim(dim, -1)
    p, _ = _Entmax15.apply(rows)
    out: Tensor = p.movedim(-1, dim).to(x.dtype)
    return out


class _Entmax15(torch.autograd.Function):
    """``x -> (p, s)`` along the last dimension with ``s = sqrt(p)``; s is what the backward passes need."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        s = _roots(x)
        return s.square(), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor | None, grad_s: Tensor | None) -> Tensor | None:
        """Written in differentiable operations on s, which is an output: so it can be differentiated again.

        With dt/dx from ``sum_i s_i (dx_i / 2 - dt) = 0`` on the support: ``ds_i = (dx_i - sum_j s_j dx_j / sum s) /
        2``.
        """
        (s,) = ctx.saved_tensors
        total = s.sum(-1, keepdim=True)
        grad = None
        if grad_p is not None:
            weighted = grad_p * s
            grad = torch.addcmul(weighted, s, weighted.sum(-1, keepdim=True) / total, value=-1)
        if grad_s is not None:
            inside = torch.where(s > 0, grad_s, 0.0)
            part = (inside - s * (inside.sum(-1, keepdim=True) / total)) / 2
            grad = part if grad is None else grad + part
        return grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Rows are independent: a batch of calls is one call."""
        rows = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
        p, s = _Entmax15.apply(rows)
        if in_dims[0] is None:
            p, s = (v.expand(info.batch_size, *v.shape) for v in (p, s))
        return (p, s), (0, 0)


def _roots(x: Tensor) -> Tensor:
    """``max(z - t, 0)`` along the last dimension, in pieces that fit into a CPU's cache."""
    n = x.shape[-1]
    steps = (6 if n <= 512 else 8 if n <= 16384 else 10) + (2 if x.dtype == torch.float64 else 0)
    if x.device.type != "cpu" or x.numel() <= _CHUNK or torch.compiler.is_compiling():
        return _newton(x, steps)
    rows_Rn = x.reshape(-1, n)
    roots_Rn = torch.empty_like(rows_Rn, memory_format=torch.contiguous_format)
    size = max(1, _CHUNK // n)
    for begin in range(0, rows_Rn.shape[0], size):
        roots_Rn[begin : begin + size] = _newton(rows_Rn[begin : begin + size], steps)
    return roots_Rn.view(x.shape)


def _newton(x: Tensor, steps: int) -> Tensor:
    # Subtracting the maximum first keeps full precision for scores of any size.
    z = (x - x.amax(-1, keepdim=True)).mul_(0.5)
    # Two lower bounds of t: the largest entry alone gives at most 1, and sum_i (z_i - t) <= sum s <= sqrt(n).
    t = (z.mean(-1, keepdim=True) - x.shape[-1] ** -0.5).clamp_min_(-1.0)
    for _ in range(steps):
        s = torch.sub(z, t).relu_()
        norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        t = t + (norm - 1) * norm / s.sum(-1, keepdim=True)
    return torch.sub(z, t).relu_()
