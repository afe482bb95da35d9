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
from moe.models.nac.draws import Branch, Draws, add_residual, draws_or_default
from moe.models.nac.graph_specs import AttentionOptions, ModFCSpec
from moe.models.nac.kernel import DotProductKernel
from moe.models.nac.modfc import EPS, LayerScale, ModLinear
from moe.models.nac.products import edge_attention, worth_it


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

        def residual(kept: Branch) -> Tensor:
            to, sent = (side._replace(states=kept.of(side.states)) for side in (receivers, senders))
            of_edges = (x if x is None or x.ndim == 2 else kept.of(x) for x in (log_affinity, affinity))
            return self._residual(to, sent, *of_edges)

        if not self.include_residual:
            return self._residual(receivers, senders, log_affinity, affinity)
        width = self.query_compiler.out_features
        return add_residual(receivers.states, residual, width, self.path_drop_prob, self.training, "path_drop", source)

    def _residual(
        self, receivers: Nodes, senders: Nodes, log_affinity: Tensor | None, affinity: Tensor | None
    ) -> Tensor:
        """What the messages add to the receivers' states."""
        sender_norm = self.receiver_layernorm if self.sender_layernorm is None else self.sender_layernorm
        q_BUI = self.query_compiler(self.receiver_layernorm(receivers.states), receivers.codes)
        sent = sender_norm(senders.states)
        k_BVI, v_BVI = self.key_compiler(sent, senders.codes), self.value_compiler(sent, senders.codes)
        message_BUI = attend(q_BUI, k_BVI, v_BVI, self.num_heads, log_affinity, affinity)
        return self.layer_scale(self.exit_layer(message_BUI, receivers.codes))  # type: ignore[no-any-return]

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
            receivers.signatures,
            senders.signatures,
            receivers.states.shape[0],
            draws.at(uniform=draws.name("kernel")),
            for_softmax=not scale
            and by_edges(receivers.states, senders.states, self.query_compiler.out_features // self.num_heads),
        )
        return log_affinity, log_affinity.exp() if scale else None


def split_heads(x_BUI: Tensor, num_heads: int) -> Tensor:
    """``[..., H * D] -> [..., H, D]``: channel h * D + c is channel c of head h."""
    return x_BUI.view(*x_BUI.shape[:-1], num_heads, x_BUI.shape[-1] // num_heads)


def by_edges(receivers_BUX: Tensor, senders_BVX: Tensor, head_dim: int) -> bool:
    """Whether :func:`attend` leaves the messages to ``edge_attention``: one head's scores are a large product."""
    return worth_it(receivers_BUX, receivers_BUX.shape[1] * senders_BVX.shape[1] * head_dim)


def attend(
    q_BUI: Tensor,
    k_BVI: Tensor,
    v_BVI: Tensor,
    num_heads: int,
    log_affinity: Tensor | None = None,
    affinity: Tensor | None = None,
) -> Tensor:
    """Softmax attention with affinities.

    Args:
        q_BUI: queries.
        k_BVI: keys.
        v_BVI: values.
        num_heads: heads H.
        log_affinity: added to the scores of every head: ``[U, V]``, where -inf closes an edge and a receiver without
            an open edge gets zeros, or sampled ``[B, U, V]``, which is finite.
        affinity: as ``log_affinity``, multiplies the softmax weights.

    Returns:
        Messages ``[B, U, I]``.
    """
    dead_U1 = None
    if log_affinity is not None and log_affinity.ndim == 2:
        dead_U1 = (log_affinity == -math.inf).all(dim=-1, keepdim=True)
        log_affinity = log_affinity.masked_fill(dead_U1, 0.0)
    if affinity is None and by_edges(q_BUI, k_BVI, q_BUI.shape[2] // num_heads):
        message_BUI = edge_attention(q_BUI, k_BVI, v_BVI, log_affinity, num_heads)
    else:
        q_BHUD, k_BHVD, v_BHVD = (split_heads(x, num_heads).transpose(1, 2) for x in (q_BUI, k_BVI, v_BVI))
        message_BUI = _attend_plainly(q_BHUD, k_BHVD, v_BHVD, log_affinity, affinity).transpose(1, 2).flatten(2)
    return message_BUI if dead_U1 is None else message_BUI.masked_fill(dead_U1, 0.0)


def _attend_plainly(
    q_BHUD: Tensor, k_BHVD: Tensor, v_BHVD: Tensor, log_affinity: Tensor | None, affinity: Tensor | None
) -> Tensor:
    """Messages ``[B, H, U, D]``; every receiver has an open edge."""
    scores = (q_BHUD * (1 / math.sqrt(q_BHUD.shape[-1]))) @ k_BHVD.transpose(-1, -2)
    if log_affinity is not None:
        scores = scores + _for_heads(log_affinity.to(scores.dtype))
    weights = scores.softmax(dim=-1)
    if affinity is not None:
        weights = weights * _for_heads(affinity.to(weights.dtype))
    return torch.matmul(weights.to(v_BHVD.dtype), v_BHVD)


def _for_heads(affinity: Tensor) -> Tensor:
    """An affinity beside ``[B, H, U, V]``."""
    return affinity if affinity.ndim == 2 else affinity.unsqueeze(1)
