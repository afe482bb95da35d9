"""Attention between latents, steered by their signatures (kernel) and codes (modulated projections).

``x + gamma * W_o[code] softmax(q.k / sqrt(D) + log-affinity) v`` with ``q = W_q[code] LN(x)``, keys and
values alike; the bracket means modulation by each latent's own code. Neural Attentive Circuits, section 3.

Known differences: none (golden vectors), but that a receiver without any open edge gets an empty message, not NaN.

Shapes: B batch, U receivers, V senders, S state, C code, Z signature, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.draws import Draws, draws_or_default, path_drop
from moe.models.nac.graph_specs import AttentionOptions, ModFCSpec
from moe.models.nac.kernel import DotProductKernel
from moe.models.nac.modfc import EPS, LayerScale, ModLinear


class Nodes(NamedTuple):
    """Latents of one side of a message.

    Attributes:
        states: ``[B, U, S]``.
        codes: ``[U, C]`` or ``[1, C]``.
        signatures: ``[U, Z]``; None where there is no kernel.
    """

    states: Tensor
    codes: Tensor
    signatures: Tensor | None = None


class LatentAttention(nn.Module):
    """One round of messages from senders to receivers.

    Args:
        state_dim: width S.
        code_dim: width C.
        num_heads: heads H.
        head_dim: width D of a head.
        options: kernel, layer norms, what affinities do.
        mod: options of the modulated layers.
        layer_scale: start of the layer scale; None for none.
        qkv_bias: used where the options leave it open.
        path_drop_prob: stochastic depth in training (with a residual only).
        include_residual: add the receivers' states.
        use_kernel: False for plain attention without signatures.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        num_heads: int,
        head_dim: int,
        options: AttentionOptions,
        *,
        mod: ModFCSpec,
        layer_scale: float | None,
        qkv_bias: bool = False,
        path_drop_prob: float = 0.0,
        include_residual: bool = True,
        use_kernel: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.options = num_heads, options
        bias = qkv_bias if options.qkv_bias is None else options.qkv_bias
        inner = num_heads * head_dim
        self.kernel = (
            DotProductKernel(options.kernel_kwargs, options.normalize_kernel_along_keys) if use_kernel else None
        )
        self.receiver_layernorm = nn.LayerNorm(state_dim, eps=EPS)
        self.sender_layernorm = None if options.share_layernorm else nn.LayerNorm(state_dim, eps=EPS)
        self.query_compiler = ModLinear(state_dim, inner, code_dim, mod, bias)
        self.key_compiler = ModLinear(state_dim, inner, code_dim, mod, bias)
        self.value_compiler = ModLinear(state_dim, inner, code_dim, mod, bias)
        self.exit_layer = ModLinear(inner, state_dim, code_dim, mod)
        self.layer_scale = LayerScale(state_dim, layer_scale)
        self.path_drop_prob = path_drop_prob
        self.include_residual = include_residual

    def forward(self, receivers: Nodes, senders: Nodes, draws: Draws | None = None) -> Tensor:
        """New states of the receivers, ``[B, U, S]``.

        Draws, in this order: ``kernel`` (uniform, ``[B, U, V]``) when edges are sampled, ``path_drop``.

        Raises:
            SpecError: signatures are missing, or widths don't fit.
        """
        source = draws_or_default(draws)
        log_affinity, affinity = self._affinities(receivers, senders, source)
        sender_norm = self.receiver_layernorm if self.sender_layernorm is None else self.sender_layernorm
        q_BHUD = self._heads(self.query_compiler(self.receiver_layernorm(receivers.states), receivers.codes))
        sent = sender_norm(senders.states)
        k_BHVD = self._heads(self.key_compiler(sent, senders.codes))
        v_BHVD = self._heads(self.value_compiler(sent, senders.codes))
        message = attend(q_BHUD, k_BHVD, v_BHVD, log_affinity, affinity)
        residual = self.layer_scale(self.exit_layer(message.transpose(1, 2).flatten(2), receivers.codes))
        if not self.include_residual:
            return residual  # type: ignore[no-any-return]
        return path_drop(receivers.states, residual, self.path_drop_prob, self.training, "path_drop", source)

    def _affinities(self, receivers: Nodes, senders: Nodes, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """What is added to scores and what multiplies weights, each ``[U, V]``, ``[B, U, V]`` or None."""
        mask, scale = self.options.mask_attn_scores_with_affinities, self.options.scale_attn_with_affinities
        if self.kernel is None or not (mask or scale):
            return None, None
        if receivers.signatures is None or senders.signatures is None:
            raise SpecError("This attention has a kernel, but its latents came without signatures.")
        if not mask:
            return None, self.kernel.plain(receivers.signatures, senders.signatures)
        log_affinity = self.kernel.log(
            receivers.signatures, senders.signatures, receivers.states.shape[0], draws.at(uniform=draws.name("kernel"))
        )
        return log_affinity, log_affinity.exp() if scale else None

    def _heads(self, x_BUI: Tensor) -> Tensor:
        return split_heads(x_BUI, self.num_heads).transpose(1, 2)


def split_heads(x_BUI: Tensor, num_heads: int) -> Tensor:
    """``[..., H * D] -> [..., H, D]``: channel h * D + c is channel c of head h."""
    return x_BUI.view(*x_BUI.shape[:-1], num_heads, x_BUI.shape[-1] // num_heads)


def attend(
    q_BHUD: Tensor, k_BHVD: Tensor, v_BHVD: Tensor, log_affinity: Tensor | None = None, affinity: Tensor | None = None
) -> Tensor:
    """Softmax attention with affinities.

    Args:
        q_BHUD: queries.
        k_BHVD: keys.
        v_BHVD: values.
        log_affinity: added to the scores of every head: ``[U, V]``, where -inf closes an edge and a receiver without
            an open edge gets zeros, or sampled ``[B, U, V]``, which is finite.
        affinity: as ``log_affinity``, multiplies the softmax weights.

    Returns:
        Messages ``[B, H, U, D]``.
    """
    scores = (q_BHUD * (1 / math.sqrt(q_BHUD.shape[-1]))) @ k_BHVD.transpose(-1, -2)
    dead_U1 = None
    if log_affinity is not None and log_affinity.ndim == 2:
        log_affinity = log_affinity.to(scores.dtype)
        dead_U1 = (log_affinity == -math.inf).all(dim=-1, keepdim=True)
        scores = scores + log_affinity.masked_fill(dead_U1, 0.0)
    elif log_affinity is not None:
        scores = scores + log_affinity.to(scores.dtype).unsqueeze(1)
    weights = scores.softmax(dim=-1)
    if affinity is not None:
        affinity = affinity.to(weights.dtype)
        weights = weights * (affinity if affinity.ndim == 2 else affinity.unsqueeze(1))
    message = torch.matmul(weights.to(v_BHVD.dtype), v_BHVD)
    return message if dead_U1 is None else message.masked_fill(dead_U1, 0.0)
