"""Batched products: linear maps of experts that all have the same number of rows, and mixing of tokens and slots.

:func:`slot_linear` is made of three functions that are each other's derivatives (so any order of differentiation stays
inside them):

- ``rows(x, w) = x w^T``, ``back(g, w) = g w``, ``outer(g, x) = g^T x``.

What is gained over ``einsum`` or ``baddbmm``: the weights' gradient is written once, in the layout of the weights. The
plain forms produce it transposed, and it is copied when it becomes ``.grad``. With hundreds of experts that gradient is
the largest tensor of a step; on a CPU most of its cost is the first touch of fresh memory, so it is asked for in huge
pages where the system offers them (Linux, ``madvise``).

:func:`mixing_product` is ``torch.bmm`` for few large matrices, one oneDNN product each where ``moe.layers.gemm`` finds
that faster.

Shapes: E experts, M rows per expert, I inputs, O outputs; B batch, a @ b of [M, K] and [K, N].
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe.layers.gemm import affine, uses_onednn

_HUGE = 4 << 20
"""Bytes from which fresh memory is asked for in huge pages (2 MiB each)."""
_LARGE = 1 << 17
"""Entries of an expert's matrix from which one oneDNN product per expert beats one batched product."""


def slot_linear(x_EMI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """``x_e w_e^T + b_e`` for every expert e: ``[E, M, O]``.

    Differentiable any number of times; under autocast computed in its type, as ``torch.bmm`` is.
    """
    kind = x_EMI.device.type
    if torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        x_EMI, weight_EOI = x_EMI.to(lower), weight_EOI.to(lower)
        bias_EO = None if bias_EO is None else bias_EO.to(lower)
    if not torch.compiler.is_compiling():
        out: Tensor = _Rows.apply(x_EMI, weight_EOI, bias_EO)
        return out
    y_EMO = torch.bmm(x_EMI, weight_EOI.mT)
    return y_EMO if bias_EO is None else y_EMO + bias_EO.unsqueeze(1)


def mixing_product(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    """``a @ b`` for every sample, differentiable any number of times. Leading dimensions are equal on both sides."""
    if a_BMK.ndim != 3 or not uses_onednn(a_BMK) or a_BMK.dtype != b_BKN.dtype or torch.is_autocast_enabled("cpu"):
        return a_BMK @ b_BKN
    out: Tensor = _Mixing.apply(a_BMK, b_BKN)
    return out


class _Product(torch.autograd.Function):
    """What the three share; a batch of calls (vmap) is done by broadcasting."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])


class _Rows(_Product):
    @staticmethod
    def forward(x_EMI: Tensor, w_EOI: Tensor, b_EO: Tensor | None) -> Tensor:
        return _each(x_EMI, w_EOI.mT, b_EO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_EMI, w_EOI = ctx.saved_tensors
        wants_x, wants_w, wants_b = ctx.needs_input_grad
        g_EMO = grads[0]
        return (
            _Back.apply(g_EMO, w_EOI) if wants_x else None,
            _Outer.apply(g_EMO, x_EMI) if wants_w else None,
            g_EMO.sum(1) if wants_b else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, int]:
        x, w = _batched((x, w), in_dims[:2])
        y = torch.matmul(x, w.mT)
        if b is not None:
            y = y + (b if in_dims[2] is None else b.movedim(in_dims[2], 0)).unsqueeze(-2)
        return y, 0


class _Back(_Product):
    @staticmethod
    def forward(g_EMO: Tensor, w_EOI: Tensor) -> Tensor:
        return _each(g_EMO, w_EOI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g_EMO, w_EOI = ctx.saved_tensors
        wants_g, wants_w = ctx.needs_input_grad
        c_EMI = grads[0]
        return _Rows.apply(c_EMI, w_EOI, None) if wants_g else None, _Outer.apply(g_EMO, c_EMI) if wants_w else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, w: Tensor) -> tuple[Tensor, int]:
        return torch.matmul(*_batched((g, w), in_dims)), 0


class _Outer(_Product):
    @staticmethod
    def forward(g_EMO: Tensor, x_EMI: Tensor) -> Tensor:
        out_EOI = fresh((g_EMO.shape[0], g_EMO.shape[2], x_EMI.shape[2]), g_EMO)
        return torch.bmm(g_EMO.mT, x_EMI, out=out_EOI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g_EMO, x_EMI = ctx.saved_tensors
        wants_g, wants_x = ctx.needs_input_grad
        c_EOI = grads[0]
        return _Rows.apply(x_EMI, c_EOI, None) if wants_g else None, _Back.apply(g_EMO, c_EOI) if wants_x else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, x: Tensor) -> tuple[Tensor, int]:
        g, x = _batched((g, x), in_dims)
        return torch.matmul(g.mT, x), 0


class _Mixing(_Product):
    @staticmethod
    def forward(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
        return _one_by_one(a_BMK, b_BKN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a_BMK, b_BKN = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        g_BMN = grads[0]
        return (
            mixing_product(g_BMN, b_BKN.mT) if wants_a else None,
            mixing_product(a_BMK.mT, g_BMN) if wants_b else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        return torch.matmul(*_batched((a, b), in_dims)), 0


def _each(x_EMI: Tensor, w_EIO: Tensor, b_EO: Tensor | None = None) -> Tensor:
    """One batched product for small experts, one oneDNN product per large one."""
    if uses_onednn(x_EMI) and w_EIO.shape[1] * w_EIO.shape[2] >= _LARGE and x_EMI.shape[1] > 1:
        return _one_by_one(x_EMI, w_EIO, b_EO)
    return torch.bmm(x_EMI, w_EIO) if b_EO is None else torch.baddbmm(b_EO.unsqueeze(1), x_EMI, w_EIO)


def _one_by_one(a_BMK: Tensor, b_BKN: Tensor, bias_BN: Tensor | None = None) -> Tensor:
    out_BMN = fresh((a_BMK.shape[0], a_BMK.shape[1], b_BKN.shape[2]), a_BMK)
    rows = [None] * len(out_BMN) if bias_BN is None else bias_BN.unbind(0)
    for out_MN, a_MK, b_KN, bias_N in zip(out_BMN.unbind(0), a_BMK.unbind(0), b_BKN.unbind(0), rows, strict=True):
        out_MN.copy_(affine(a_MK, b_KN.t(), bias_N))
    return out_BMN


def _batched(tensors: tuple[Tensor, Tensor], in_dims: tuple[int | None, ...]) -> tuple[Tensor, Tensor]:
    a, b = (
        value.unsqueeze(0) if axis is None else value.movedim(axis, 0)
        for value, axis in zip(tensors, in_dims, strict=True)
    )
    return a, b


def fresh(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory of the type and device of ``like``, in huge pages where it is large and on a Linux CPU."""
    out = torch.empty(shape, dtype=like.dtype, device=like.device)
    advise = _madvise()
    if advise is not None and out.device.type == "cpu" and out.nbytes >= _HUGE and type(out) is Tensor:
        page = mmap.PAGESIZE
        begin = -(-out.data_ptr() // page) * page
        length = (out.data_ptr() + out.nbytes - begin) // page * page
        # Only advice: a refusal changes the speed and nothing else, so its result is not looked at.
        advise(begin, length, mmap.MADV_HUGEPAGE)
    return out


@cache
def _madvise() -> Any:
    """The C library's ``madvise``, or None where huge pages cannot be asked for."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
