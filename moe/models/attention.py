"""Attention probabilities of timm's attention module, on request.

timm runs fused attention, which never holds the N x N probabilities. :func:`attention_with_map` is the plain form of
the same module, for attention maps (GMoE, appendix; Parity: probabilities of the block's own normalised input).

Shapes: B batch, N tokens, D width, h heads.
"""

from __future__ import annotations

from typing import NamedTuple

from timm.layers import Attention
from torch import Tensor


class Attended(NamedTuple):
    """Output of an attention module.

    Attributes:
        y_BND: what the module itself returns.
        map_BhNN: softmax probabilities; rows are queries and sum to 1.
    """

    y_BND: Tensor
    map_BhNN: Tensor


def attention_with_map(attention: Attention, x_BND: Tensor) -> Attended:
    """Run ``attention`` on ``x_BND`` in the plain form; same numbers as its forward pass up to rounding."""
    batch, tokens, _ = x_BND.shape
    shape = (batch, tokens, 3, attention.num_heads, attention.head_dim)
    q, k, v = attention.qkv(x_BND).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    map_BhNN = (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    y_BND = (attention.attn_drop(map_BhNN) @ v).transpose(1, 2).reshape(batch, tokens, attention.attn_dim)
    y_BND = attention.norm(y_BND)
    if attention.gate is not None:
        y_BND = y_BND * attention.gate(x_BND).sigmoid()
    return Attended(attention.proj_drop(attention.proj(y_BND)), map_BhNN)
