"""Matrix products for experts: the same numbers as ``torch.mm``, through oneDNN where that is the faster library.

PyTorch sends float32 products on a CPU to MKL, which uses a slow path on processors of other makers; oneDNN, which
PyTorch carries as well, runs the same product up to twice as fast there and equally fast elsewhere. The choice is a
rule (device, type, size), never a measurement, so that equal seeds give equal bits. Products are differentiable any
number of times; every derivative is a product of the same kind.

Shapes: M rows, K contracted width, N columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.layers.activation import Activation, activate

_FUSED: dict[Activation, tuple[str, str]] = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def onednn_available() -> bool:
    """Whether this build of PyTorch carries oneDNN's product."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = onednn_available()


def uses_onednn(tensor: Tensor) -> bool:
    """Whether products of this tensor go to oneDNN: float32 on a CPU, and not inside ``torch.compile``."""
    return bool(
        _ONEDNN
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and not torch.compiler.is_compiling()
    )


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``a @ b`` without a graph; any strides, any number of rows including none."""
    if uses_onednn(a_MK) and a_MK.numel() and b_KN.numel():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a_MK), _dense(b_KN).t(), None, "none", [], "")
        return out
    return torch.mm(a_MK, b_KN)


def affine(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None, activation: Activation | None = None) -> Tensor:
    """``activation(x @ w^T + b)`` without a graph, in one pass where the library can."""
    if uses_onednn(x_MK) and x_MK.numel() and w_NK.numel():
        name, algorithm = _FUSED[activation] if activation else ("none", "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x_MK), _dense(w_NK), b_N, name, [], algorithm)
        return out
    h_MN = torch.mm(x_MK, w_NK.t()) if b_N is None else torch.addmm(b_N, x_MK, w_NK.t())
    return activate(h_MN, activation) if activation else h_MN


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps, by rows or by columns; oneDNN takes any other to its reference code, 400 times slower."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(a_MK: Tensor, b_KN: Tensor) -> Tensor:
        return product(a_MK, b_KN)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (g_MN,) = grads
        a_MK, b_KN = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        return (
            matmul(g_MN, b_KN.t()) if wants_a else None,
            matmul(a_MK.t(), g_MN) if wants_b else None,
        )


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``a @ b`` of two matrices, differentiable any number of times."""
    if not uses_onednn(a_MK):
        return torch.mm(a_MK, b_KN)
    if torch.is_grad_enabled() and (a_MK.requires_grad or b_KN.requires_grad):
        out: Tensor = _Matmul.apply(a_MK, b_KN)
        return out
    return product(a_MK, b_KN)


def linear(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    """``x @ w^T + b``, differentiable any number of times."""
    out_MN = matmul(x_MK, w_NK.t())
    return out_MN if b_N is None else out_MN + b_N
