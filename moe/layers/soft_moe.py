"""Soft MoE: every slot is a softmax-weighted mean of all tokens, every token a softmax-weighted sum of all slots.

Source: Soft MoE (arXiv 2308.00951), in the form of MoE Jetpack's baseline (arXiv 2406.04801, public code at its last
commit): ``logits = scale * unit(x) . unit(phi)``, dispatch = softmax over tokens, combine = softmax over all slots.

Parity: with ``slot_layernorm`` queries are layer-normalised instead of unit vectors and keys stay as they are.
Differs: noise only in training unless ``noise_in_eval``; experts start like ``nn.Linear`` unless ``expert_init`` is
``official``.

Shapes: B batch, N tokens, D width, E experts, S slots per expert, Q = E * S.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.jetpack_specs import SoftMoESpec
from moe.layers.draws import Draws
from moe.layers.slot_experts import Affine, ExpertMLP
from moe.layers.slots import Mix, SlotLayer, gaussian, hidden_width, key_map, scores_of, unit


class SoftMoE(SlotLayer):
    """A Soft MoE layer.

    State-dict names: ``phi`` [E, S, D], ``scale``, ``slot_norm.*``, ``phi_key_proj.*``, ``phi_query_proj.*``,
    ``experts.vit_fc1.*``, ``experts.vit_fc2.*``.

    Args:
        dim: width D.
        spec: options.
        phi: queries shared with other layers; own ones when None.
    """

    spec: SoftMoESpec

    def __init__(self, dim: int, spec: SoftMoESpec, phi: nn.Parameter | None = None) -> None:
        super().__init__(dim, spec, spec.num_experts)
        self.phi = nn.Parameter(gaussian(spec.num_experts, spec.slots_per_expert, dim)) if phi is None else phi
        self.scale = nn.Parameter(torch.ones(()))
        self.slot_norm = nn.LayerNorm(dim) if spec.slot_layernorm else None
        self.phi_key_proj = key_map(spec, dim)
        self.phi_query_proj = Affine(dim) if spec.query_proj == "affine" else None
        self.experts = ExpertMLP(
            dim,
            hidden_width(dim, spec.compress_ratio),
            spec.num_experts,
            layer_scale=spec.layer_scale,
            drop=spec.drop,
            drop_act=spec.drop_act,
            init=spec.expert_init,
        )

    def route(self, x: Tensor, draws: Draws) -> Mix:
        """See the base class."""
        keys = x if self.phi_key_proj is None else self.phi_key_proj(x)
        queries_QD = self.phi.flatten(0, 1).to(x.dtype)
        if self.phi_query_proj is not None:
            queries_QD = self.phi_query_proj(queries_QD)
        if self.slot_norm is None:
            keys, queries_QD = unit(keys), unit(queries_QD)
        else:
            queries_QD = self.slot_norm(queries_QD)
        scores_BNQ = scores_of(keys, queries_QD * self.scale)
        noise = self.noise(scores_BNQ, draws)
        if noise is not None:
            scores_BNQ = scores_BNQ + noise
        scores_BNQ = self.mask_scores(scores_BNQ, draws, self.spec.logit_dropout_in_eval)
        return Mix(scores_BNQ.softmax(dim=-2), scores_BNQ.softmax(dim=-1))

    def process(self, slots_BQD: Tensor, draws: Draws) -> Tensor:
        """See the base class."""
        slots_BESD = slots_BQD.view(len(slots_BQD), self.num_experts, -1, self.dim)
        out_BESD: Tensor = self.experts(slots_BESD, draws.below("experts"))
        return out_BESD.flatten(1, 2)
