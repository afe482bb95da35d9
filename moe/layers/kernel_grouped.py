"""Kernel ``grouped``: all experts in one call of ``torch.nn.functional.grouped_mm``, with its traps wrapped.

- Rows need strides of whole 16 bytes: widths are padded with zeros, which change no sum.
- A gradient that was expanded (the backward of ``sum``) is refused: it is made contiguous first.
- Rows behind the last group come back uninitialised: they are set to zero.
- It knows float32, bfloat16 and float16 only, and its counts may stay on the device: nothing here waits for them.

Two products that are each other's derivatives make it differentiable any number of times.

Shapes: M rows grouped by expert, K contracted width, N columns, D in, H hidden, O out, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.layers.activation import Hidden, Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_available() -> bool:
    """Whether this PyTorch has the function (2.9 and later have it on CPUs)."""
    return hasattr(F, "grouped_mm")


def grouped_ffn(x_MD: Tensor, ends_E: Tensor, weights: Weights, mask_MH: Tensor | None, hidden: Hidden) -> Tensor:
    """See :func:`moe.layers.kernels.expert_ffn`; ``ends_E`` (int32) are the cumulative counts."""
    out = weights.w2.shape[1]
    if not x_MD.shape[0]:
        # Nothing to multiply, but every weight still gets a gradient of zeros.
        zero = sum(t.flatten()[:0].sum() for t in (x_MD, *weights) if t is not None)
        return x_MD.new_zeros(0, out) + zero
    width = 16 // x_MD.element_size()
    inside_M1 = (torch.arange(x_MD.shape[0], device=x_MD.device) < ends_E[-1]).unsqueeze(1)
    # The bias is one more grouped product, with a column of ones: no gather, no scatter in the backward.
    ones_MK = F.pad(x_MD.new_ones(x_MD.shape[0], 1), (0, width - 1))
    h_MH = _layer(_pad(x_MD, width), ones_MK, weights.w1, weights.b1, ends_E, inside_M1, width)
    # All activations are zero at zero, so that padded units stay zero.
    a_MH = hidden(h_MH, None if mask_MH is None else _pad(mask_MH, width))
    y_MO = _layer(a_MH, ones_MK, weights.w2, weights.b2, ends_E, inside_M1, width)
    return y_MO[:, :out]


def _layer(
    x_MK: Tensor, ones_MK: Tensor, w_ENK: Tensor, b_EN: Tensor | None, ends_E: Tensor, inside_M1: Tensor, width: int
) -> Tensor:
    n, k = -w_ENK.shape[1] % width, -w_ENK.shape[2] % width
    w_ENK = F.pad(w_ENK, (0, k, 0, n)) if n or k else w_ENK
    y_MN = grouped_rows(x_MK, w_ENK.transpose(1, 2), ends_E, inside_M1)
    if b_EN is None:
        return y_MN
    b_EKN = F.pad(b_EN.unsqueeze(1), (0, n, 0, width - 1))
    return y_MN + grouped_rows(ones_MK, b_EKN, ends_E, inside_M1)


def _pad(x: Tensor, width: int) -> Tensor:
    short = -x.shape[-1] % width
    return F.pad(x, (0, short)) if short else x


def _aligned(x: Tensor) -> Tensor:
    """The tensor with one stride of 1 and the other of whole 16 bytes, copied if need be."""
    size = x.element_size()
    rows, columns = x.stride()[-2:]
    other = rows if columns == 1 else columns
    good = 1 in (rows, columns) and other * size % 16 == 0 and 0 not in x.stride()
    # A compiler allocates its own, aligned tensors and cannot ask for the offset.
    if good and (torch.compiler.is_compiling() or x.storage_offset() * size % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class _GroupedRows(torch.autograd.Function):
    @staticmethod
    def forward(x_MK: Tensor, w_EKN: Tensor, ends_E: Tensor, inside_M1: Tensor) -> Tensor:
        y_MN = F.grouped_mm(_aligned(x_MK), _aligned(w_EKN), offs=ends_E)
        return torch.where(inside_M1, y_MN, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_MN,) = grads
        x_MK, w_EKN, ends_E, inside_M1 = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dx_MK = grouped_rows(g_MN, w_EKN.transpose(1, 2), ends_E, inside_M1) if wants[0] else None
        dw_EKN = grouped_outer(x_MK, g_MN, ends_E, inside_M1) if wants[1] else None
        return dx_MK, dw_EKN, None, None


class _GroupedOuter(torch.autograd.Function):
    @staticmethod
    def forward(x_MK: Tensor, g_MN: Tensor, ends_E: Tensor, inside_M1: Tensor) -> Tensor:
        return F.grouped_mm(_aligned(x_MK).t(), _aligned(g_MN), offs=ends_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_EKN,) = grads
        x_MK, g_MN, ends_E, inside_M1 = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dx_MK = grouped_rows(g_MN, d_EKN.transpose(1, 2), ends_E, inside_M1) if wants[0] else None
        dg_MN = grouped_rows(x_MK, d_EKN, ends_E, inside_M1) if wants[1] else None
        return dx_MK, dg_MN, None, None


def grouped_rows(x_MK: Tensor, w_EKN: Tensor, ends_E: Tensor, inside_M1: Tensor) -> Tensor:
    """Rows of group e times ``w[e]``: ``[M, N]``; rows behind the last group are zeros."""
    out: Tensor = _GroupedRows.apply(x_MK, w_EKN, ends_E, inside_M1)
    return out


def grouped_outer(x_MK: Tensor, g_MN: Tensor, ends_E: Tensor, inside_M1: Tensor) -> Tensor:
    """``x^T g`` over the rows of each group: ``[E, K, N]``; zeros for a group without rows."""
    out: Tensor = _GroupedOuter.apply(x_MK, g_MN, ends_E, inside_M1)
    return out
