"""The circuit's large products on a CPU: modulated linear map, gated GELU, attention over edges.

Each is one function for autograd, differentiable any number of times, with the numbers of the plain formula (up to the
order of summation). What is gained over the plain form: products go to the faster library (``moe.layers.gemm``), one
tile of attention scores is in the cache at a time instead of ``[B, H, U, V]`` in memory, the scaled input and the
weights of attention are made again in the backward pass instead of being kept, and gradients of halves are written
where they belong.

:func:`worth_it` is the rule for when; it looks at device, type and size only, so that equal seeds give equal bits.

Shapes: B batch, U receivers, V senders, H heads, D width of a head, I = H * D inputs, O outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.layers.gemm import affine, matmul, product, uses_onednn
from moe.layers.slot_product import mixing_product

LARGE = 1 << 20
"""Operations (multiplications with addition) from which a function of its own is worth it."""


def worth_it(x: Tensor, operations: int) -> bool:
    """Whether something of ``x`` is computed here: large, float32, on a CPU; not under autocast or a transform."""
    return (
        operations >= LARGE
        and uses_onednn(x)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def modulated(x_BUI: Tensor, scale_UI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    """``(x * scale) W^T + b``; the scale is of every latent, ``[U, I]``, or of all, ``[1, I]``."""
    out: Tensor = _Modulated.apply(x_BUI, scale_UI, w_OI, b_O)
    return out


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BUI: Tensor, scale_UI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BUI, scale_UI, w_OI)
        h_BUI = x_BUI * scale_UI
        return affine(h_BUI.flatten(0, -2), w_OI, b_O).view(*x_BUI.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BUI, scale_UI, w_OI = ctx.saved_tensors
        wants_x, wants_scale, wants_w, wants_b = ctx.needs_input_grad
        g_NO = grads[0].flatten(0, -2)
        g_w = matmul(g_NO.t(), (x_BUI * scale_UI).flatten(0, -2)) if wants_w else None
        g_b = g_NO.sum(0) if wants_b else None
        if not (wants_x or wants_scale):
            return None, None, g_w, g_b
        g_BUI = matmul(g_NO, w_OI).view(x_BUI.shape)
        g_scale = _scale_gradient(g_BUI, x_BUI, len(scale_UI)) if wants_scale else None
        if wants_x:
            g_BUI = g_BUI * scale_UI if torch.is_grad_enabled() else g_BUI.mul_(scale_UI)
        return g_BUI if wants_x else None, g_scale, g_w, g_b


def _scale_gradient(g_BUI: Tensor, x_BUI: Tensor, scales: int) -> Tensor:
    """Sum of ``g * x`` over what shares a scale."""
    if scales != x_BUI.shape[1]:
        return (g_BUI * x_BUI).sum((0, 1)).unsqueeze(0)
    if torch.is_grad_enabled():
        return (g_BUI * x_BUI).sum(0)
    total_UI = g_BUI[0] * x_BUI[0]
    for g_UI, x_UI in zip(g_BUI[1:].unbind(0), x_BUI[1:].unbind(0), strict=True):
        total_UI.addcmul_(g_UI, x_UI)
    return total_UI


def linear(x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``; the weight's gradient has the weight's own layout."""
    out: Tensor = _Linear.apply(x_NI, w_OI, b_O)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI)
        return affine(x_NI, w_OI, b_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_OI = ctx.saved_tensors
        wants_x, wants_w, wants_b = ctx.needs_input_grad
        (g_NO,) = grads
        return (
            matmul(g_NO, w_OI) if wants_x else None,
            matmul(g_NO.t(), x_NI) if wants_w else None,
            g_NO.sum(0) if wants_b else None,
        )


def log_probability(z: Tensor) -> Tensor:
    """``log(sigmoid(z))``, the probability clamped to between the smallest normal number and 1 - eps.

    The gradient is zero where it is clamped.
    """
    out: Tensor = _LogProbability.apply(z)
    return out


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        limits = torch.finfo(z.dtype)
        return z.sigmoid().clamp_(limits.tiny, 1 - limits.eps).log_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,) = grads
        (z,) = ctx.saved_tensors
        limits = torch.finfo(z.dtype)
        clamped = (z < math.log(limits.tiny)) | (z > math.log((1 - limits.eps) / limits.eps))
        return (g * torch.sigmoid(-z)).masked_fill(clamped, 0.0)


def geglu(x: Tensor) -> Tensor:
    """First half of the channels times the exact GELU of the second."""
    out: Tensor = _Geglu.apply(x)
    return out


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,) = grads
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return torch.cat([g * F.gelu(gate), torch.ops.aten.gelu_backward(g * value, gate)], dim=-1)
        out = torch.empty_like(x)
        g_value, g_gate = out.chunk(2, dim=-1)
        torch.mul(F.gelu(gate), g, out=g_value)
        torch.ops.aten.gelu_backward.grad_input(g * value, gate, grad_input=g_gate)
        return out


def edge_attention(q_BUI: Tensor, k_BVI: Tensor, v_BVI: Tensor, log_affinity: Tensor | None, heads: int) -> Tensor:
    """Softmax attention of every head, ``[B, U, I]``; channel h * D + c is channel c of head h.

    Args:
        q_BUI: queries.
        k_BVI: keys.
        v_BVI: values.
        log_affinity: added to the scores of every head, ``[U, V]`` or ``[B, U, V]``; -inf closes an edge, and every
            receiver has an open one. None adds nothing.
        heads: their number.
    """
    out: Tensor = _EdgeAttention.apply(q_BUI, k_BVI, v_BVI, log_affinity, heads)
    return out


class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_affinity: Tensor | None, heads: int) -> Tensor:
        ctx.save_for_backward(q, k, v, *([] if log_affinity is None else [log_affinity]))
        ctx.heads = heads
        tiles = zip(*(_split(x, heads) for x in (q, k, v)), strict=True)
        found = [
            product(_weights(q_UD, k_VD, log_affinity, tile // heads), v_VD)
            for tile, (q_UD, k_VD, v_VD) in enumerate(tiles)
        ]
        return _merge(torch.stack(found), heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        log_affinity: Tensor | None = rest[0] if rest else None
        (g,) = grads
        heads: int = ctx.heads
        if torch.is_grad_enabled():
            return (*_gradients(g, q, k, v, log_affinity, heads), None)
        g_log = torch.zeros_like(log_affinity) if ctx.needs_input_grad[3] else None  # type: ignore[arg-type]
        parts: list[list[Tensor]] = [[], [], []]
        for tile, (g_UD, q_UD, k_VD, v_VD) in enumerate(
            zip(*(_split(x, heads) for x in (g.contiguous(), q, k, v)), strict=True)
        ):
            w_UV = _weights(q_UD, k_VD, log_affinity, tile // heads)
            g_UV = product(g_UD, v_VD.t()).mul_(w_UV)
            g_UV.addcmul_(w_UV, g_UV.sum(dim=-1, keepdim=True), value=-1)
            if g_log is not None:
                _of(g_log, tile // heads).add_(g_UV)
            found = (product(g_UV, k_VD), product(g_UV.t(), q_UD), product(w_UV.t(), g_UD))
            for part, one in zip(parts, found, strict=True):
                part.append(one)
        g_q, g_k, g_v = (_merge(torch.stack(part), heads) for part in parts)
        factor = 1 / math.sqrt(q.shape[-1] // heads)
        return g_q.mul_(factor), g_k.mul_(factor), g_v, g_log, None


def _split(x_BNI: Tensor, heads: int) -> Tensor:
    """``[B * H, N, D]``, every matrix without gaps."""
    return x_BNI.view(*x_BNI.shape[:-1], heads, x_BNI.shape[-1] // heads).transpose(1, 2).flatten(0, 1)


def _merge(x_XND: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_split`."""
    return x_XND.view(len(x_XND) // heads, heads, *x_XND.shape[1:]).transpose(1, 2).flatten(2)


def _of(log_affinity: Tensor, sample: int) -> Tensor:
    return log_affinity if log_affinity.ndim == 2 else log_affinity[sample]


def _weights(q_UD: Tensor, k_VD: Tensor, log_affinity: Tensor | None, sample: int) -> Tensor:
    """Softmax weights of one sample and head."""
    scores_UV, factor = product(q_UD, k_VD.t()), 1 / math.sqrt(q_UD.shape[-1])
    if log_affinity is None:
        return scores_UV.mul_(factor).softmax(dim=-1)
    return torch.add(_of(log_affinity, sample), scores_UV, alpha=factor).softmax(dim=-1)


def _gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, log_affinity: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the backward pass computes, written so that it can be differentiated again."""
    factor = 1 / math.sqrt(q.shape[-1] // heads)
    q_XUD, k_XVD, v_XVD, g_XUD = (_split(x, heads) for x in (q * factor, k, v, g.contiguous()))
    scores_XUV = mixing_product(q_XUD, k_XVD.mT)
    if log_affinity is not None:
        each = log_affinity if log_affinity.ndim == 2 else log_affinity.repeat_interleave(heads, dim=0)
        scores_XUV = scores_XUV + each
    w_XUV = scores_XUV.softmax(dim=-1)
    g_XUV = mixing_product(g_XUD, v_XVD.mT)
    g_XUV = w_XUV * (g_XUV - (g_XUV * w_XUV).sum(dim=-1, keepdim=True))
    g_log = None
    if log_affinity is not None:
        g_log = g_XUV.sum(0) if log_affinity.ndim == 2 else g_XUV.view(-1, heads, *g_XUV.shape[1:]).sum(1)
    return (
        _merge(mixing_product(g_XUV, k_XVD), heads) * factor,
        _merge(mixing_product(g_XUV.mT, q_XUD), heads),
        _merge(mixing_product(w_XUV.mT, g_XUD), heads),
        g_log,
    )
