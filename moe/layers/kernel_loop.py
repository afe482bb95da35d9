"""Kernel ``loop``: one expert after the other, forward and backward fused into one step of the graph.

The pre-activations of one expert at a time stay in the cache, and every expert's gradient goes straight to its place in
the stacked gradient. (Indexing ``w[e]`` in a loop lets each index allocate a gradient of all experts, which makes the
backward quadratic in E.) Hidden units are computed again in the backward: cheaper than keeping them.

The backward is made of differentiable products when a graph of it is asked for. The pre-activations are outputs of the
step, unseen by the caller: so they carry a graph, and a second backward adds their gradients to those of the results
instead of going through the first layer twice.

Shapes: M rows grouped by expert, D width in, H hidden, O width out, E experts; m rows of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.layers.activation import Hidden, Weights
from moe.layers.gemm import affine, matmul


class _Gradients(NamedTuple):
    """Gradients of one expert; None where nobody asks for it."""

    x: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None


def loop_ffn(x_MD: Tensor, counts: Sequence[int], weights: Weights, mask_MH: Tensor | None, hidden: Hidden) -> Tensor:
    """See :func:`moe.layers.kernels.expert_ffn`; shapes are checked there, and the counts sum to M.

    The dropout factors are constants: they get no gradient.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_MD, *weights)):
        out: Tensor = _LoopFFN.apply(x_MD, *weights, mask_MH, tuple(counts), hidden)[0]
        return out
    return _forward(x_MD, counts, weights, mask_MH, hidden, keep=False)[0]


def _forward(
    x_MD: Tensor, counts: Sequence[int], weights: Weights, mask_MH: Tensor | None, hidden: Hidden, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Results ``[M, O]`` and, with ``keep``, the pre-activations of each expert that has rows."""
    y_MO = x_MD.new_empty(x_MD.shape[0], weights.w2.shape[1])
    kept: list[Tensor] = []
    for e, rows in _groups(counts):
        b1_H, b2_O = (None if b is None else b[e] for b in (weights.b1, weights.b2))
        if keep or mask_MH is not None:
            h_mH = affine(x_MD[rows], weights.w1[e], b1_H)
            a_mH = hidden(h_mH, None if mask_MH is None else mask_MH[rows])
            if keep:
                kept.append(h_mH)
        else:
            a_mH = affine(x_MD[rows], weights.w1[e], b1_H, hidden.activation)
        y_MO[rows] = affine(a_mH, weights.w2[e], b2_O)
    return y_MO, kept


def _groups(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Number and rows of each expert that has any."""
    groups, start = [], 0
    for e, rows in enumerate(counts):
        if rows:
            groups.append((e, slice(start, start + rows)))
        start += rows
    return groups


class _LoopFFN(torch.autograd.Function):
    """Outputs: y, then the pre-activations of each expert that has rows."""

    @staticmethod
    def forward(
        x_MD: Tensor,
        w1_EHD: Tensor,
        b1_EH: Tensor | None,
        w2_EOH: Tensor,
        b2_EO: Tensor | None,
        mask_MH: Tensor | None,
        counts: tuple[int, ...],
        hidden: Hidden,
    ) -> tuple[Tensor, ...]:
        y_MO, kept = _forward(x_MD, counts, Weights(w1_EHD, b1_EH, w2_EOH, b2_EO), mask_MH, hidden, keep=True)
        return y_MO, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x_MD, w1_EHD, _, w2_EOH, _, mask_MH, ctx.counts, ctx.hidden = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_MD, w1_EHD, w2_EOH, mask_MH, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_MD, w1_EHD, w2_EOH, mask_MH, *kept = ctx.saved_tensors
        dy_MO, *dh_e = grads
        wants = ctx.needs_input_grad[:5]
        # Unbound once: a graph of this backward must not index the stacked weights expert by expert.
        w1s, w2s = w1_EHD.unbind(), w2_EOH.unbind()
        groups = _groups(ctx.counts)
        sizes = [rows.stop - rows.start for _, rows in groups]
        xs = torch.split(x_MD, sizes) if groups else ()
        dys: Sequence[Tensor | None] = [None] * len(groups)
        if dy_MO is not None and groups:
            dys = torch.split(dy_MO, sizes)
        out = (_Joined if torch.is_grad_enabled() else _Stacked)(x_MD, w1_EHD, w2_EOH, wants)
        for (e, rows), x_mD, h_mH, dy_mO, dh_mH in zip(groups, xs, kept, dys, dh_e, strict=True):
            mask_mH = None if mask_MH is None else mask_MH[rows]
            out.add(e, rows, _one_expert(x_mD, h_mH, mask_mH, dy_mO, dh_mH, w1s[e], w2s[e], wants, ctx.hidden))
        return *out.result(), None, None, None


def _one_expert(
    x_mD: Tensor,
    h_mH: Tensor,
    mask_mH: Tensor | None,
    dy_mO: Tensor | None,
    dh_mH: Tensor | None,
    w1_HD: Tensor,
    w2_OH: Tensor,
    wants: Sequence[bool],
    hidden: Hidden,
) -> _Gradients:
    """Gradients of one expert's rows and weights, from those of its results and of its pre-activations."""
    wants_x, wants_w1, wants_b1, wants_w2, wants_b2 = wants
    dw2 = db2 = None
    if dy_mO is not None:
        dw2 = matmul(dy_mO.t(), hidden(h_mH, mask_mH)) if wants_w2 else None
        db2 = dy_mO.sum(0) if wants_b2 else None
        if wants_x or wants_w1 or wants_b1:
            through_mH = hidden.gradient(matmul(dy_mO, w2_OH), h_mH, mask_mH)
            dh_mH = through_mH if dh_mH is None else through_mH + dh_mH
    if dh_mH is None:
        return _Gradients(w2=dw2, b2=db2)
    dx = matmul(dh_mH, w1_HD) if wants_x else None
    dw1 = matmul(dh_mH.t(), x_mD) if wants_w1 else None
    return _Gradients(dx, dw1, dh_mH.sum(0) if wants_b1 else None, dw2, db2)


class _Stacked:
    """Gradients of all experts, written in place; zeros where an expert has none."""

    def __init__(self, x_MD: Tensor, w1_EHD: Tensor, w2_EOH: Tensor, wants: Sequence[bool]) -> None:
        shapes = _shapes(x_MD, w1_EHD, w2_EOH)
        self.whole = [x_MD.new_empty(s) if wanted else None for s, wanted in zip(shapes, wants, strict=True)]
        self.experts = w1_EHD.shape[0]
        self.seen: set[int] = set()

    def add(self, e: int, rows: slice, gradients: _Gradients) -> None:
        """Take one expert's gradients."""
        self.seen.add(e)
        for index, (whole, gradient) in enumerate(zip(self.whole, gradients, strict=True)):
            if whole is not None:
                place = whole[rows if index == 0 else e]
                place.zero_() if gradient is None else place.copy_(gradient)

    def result(self) -> list[Tensor | None]:
        """Gradients of x, w1, b1, w2, b2."""
        for e in set(range(self.experts)) - self.seen:
            for whole in self.whole[1:]:
                if whole is not None:
                    whole[e].zero_()
        return self.whole


class _Joined:
    """The same for gradients that carry a graph themselves."""

    def __init__(self, x_MD: Tensor, w1_EHD: Tensor, w2_EOH: Tensor, wants: Sequence[bool]) -> None:
        self.shapes, self.wants, self.like = _shapes(x_MD, w1_EHD, w2_EOH), wants, x_MD
        self.parts: list[_Gradients] = [_Gradients()] * w1_EHD.shape[0]
        self.rows: list[Tensor] = []

    def add(self, e: int, rows: slice, gradients: _Gradients) -> None:
        """Take one expert's gradients."""
        self.parts[e] = gradients
        dx = gradients.x
        self.rows.append(self.like.new_zeros(rows.stop - rows.start, self.like.shape[1]) if dx is None else dx)

    def result(self) -> list[Tensor | None]:
        """Gradients of x, w1, b1, w2, b2."""
        joined: list[Tensor | None] = [None] * len(self.shapes)
        if self.wants[0]:
            joined[0] = torch.cat(self.rows) if self.rows else self.like.new_zeros(self.shapes[0])
        for index in range(1, len(self.shapes)):
            if self.wants[index]:
                found = [part[index] for part in self.parts]
                zero = self.like.new_zeros(self.shapes[index][1:])
                joined[index] = torch.stack([zero if g is None else g for g in found])
        return joined


def _shapes(x_MD: Tensor, w1_EHD: Tensor, w2_EOH: Tensor) -> list[tuple[int, ...]]:
    experts, hidden, width = w1_EHD.shape
    out = w2_EOH.shape[1]
    return [(x_MD.shape[0], width), (experts, hidden, width), (experts, hidden), (experts, out, hidden), (experts, out)]
