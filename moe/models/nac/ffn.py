"""Modulated feed-forward block: layer norm, modulated layer, (gated) GELU, modulated layer, layer scale, residual.

Known differences: none (golden vectors). Shapes: B batch, U latents, S state width, C code width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe.models.nac.draws import Draws, add_residual, draws_or_default
from moe.models.nac.graph_specs import ModFCSpec
from moe.models.nac.modfc import EPS, LayerScale, ModLinear
from moe.models.nac.products import geglu, worth_it


class Activation(nn.Module):
    """Exact GELU; gated, the first half of the channels times the GELU of the second."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 2H] -> [..., H]`` if gated, else shape-preserving."""
        if not self.gated:
            return F.gelu(x)
        if worth_it(x, x.numel()):
            return geglu(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class ModFFN(nn.Module):
    """The feed-forward half of a circuit's layer.

    Args:
        state_dim: width S.
        code_dim: width C.
        capacity_factor: hidden width as a multiple of S, rounded half to even.
        use_geglu: gated GELU (the first layer is then twice as wide).
        layer_scale: start of the layer scale; None for none.
        mod: options of the modulated layers.
        path_drop_prob: stochastic depth in training (with a residual only).
        include_residual: add the states.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        capacity_factor: float,
        *,
        use_geglu: bool,
        layer_scale: float | None,
        mod: ModFCSpec,
        path_drop_prob: float = 0.0,
        include_residual: bool = True,
    ) -> None:
        super().__init__()
        hidden = max(1, round(capacity_factor * state_dim))
        self.layernorm = nn.LayerNorm(state_dim, eps=EPS)
        self.ffn = nn.ModuleList(
            [
                ModLinear(state_dim, hidden * (2 if use_geglu else 1), code_dim, mod),
                Activation(use_geglu),
                ModLinear(hidden, state_dim, code_dim, mod),
            ]
        )
        self.layer_scale = LayerScale(state_dim, layer_scale)
        self.path_drop_prob = path_drop_prob
        self.include_residual = include_residual

    def forward(self, states_BUS: Tensor, codes_UC: Tensor, draws: Draws | None = None) -> Tensor:
        """New states ``[B, U, S]``. Draw: ``path_drop`` (uniform, ``[B, 1, 1]``), in training with a rate above 0."""
        if not self.include_residual:
            return self._residual(states_BUS, codes_UC)
        into: ModLinear = self.ffn[0]  # type: ignore[assignment]
        return add_residual(
            states_BUS,
            lambda kept: self._residual(kept.of(states_BUS), codes_UC),
            into.out_features,
            self.path_drop_prob,
            self.training,
            "path_drop",
            draws_or_default(draws),
        )

    def _residual(self, states_BUS: Tensor, codes_UC: Tensor) -> Tensor:
        into, activation, out = self.ffn
        hidden = activation(into(self.layernorm(states_BUS), codes_UC))
        return self.layer_scale(out(hidden, codes_UC))  # type: ignore[no-any-return]
