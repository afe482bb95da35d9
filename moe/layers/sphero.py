"""SpheroMoE: routing between unit vectors under learned temperatures, with few large and many small experts.

Source: MoE Jetpack (NeurIPS 2024, arXiv 2406.04801, section 3.3) and its released code. With keys ``k = unit(x)`` and
queries ``q = unit(LayerNorm(phi))``::

    D = softmax_n(k.q / T0 + eps)     slot_e = sum_n D_ne x_n
    A = entmax1.5_e(k.q / T1 + eps)   y_n = sum_e A_ne FFN_e(slot_e)      eps = noise_mult * N(0, 1), the same in both

Experts: the first C are core ones, the other U universal ones of a quarter of the hidden width.

- Parity: defaults follow the released code, where it and the paper differ: keys are normalised too, combine is entmax,
  two temperatures, noise after the division, drop path per sample.
- Differs: noise only in training unless ``noise_in_eval``; experts start like ``nn.Linear`` unless ``expert_init`` is
  ``official``; the released logit mask is drawn and never used, ``logit_dropout`` here works.

Shapes: B batch, N tokens, D width, E experts, S slots per expert, Q = E * S, h heads, d = D / h.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError
from moe.jetpack_specs import SpheroSpec
from moe.layers.draws import Draws
from moe.layers.entmax import entmax15
from moe.layers.slot_experts import Affine, ExpertMLP
from moe.layers.slots import (
    Mix,
    SlotLayer,
    adjust_query_length,
    hidden_width,
    key_map,
    scores_of,
    semi_orthogonal,
    unit,
)


class SpheroMoE(SlotLayer):
    """A SpheroMoE layer.

    State-dict names: ``phi`` [E, S, D], ``slot_norm.*``, ``scales.0`` (dispatch), ``scales.1`` (combine),
    ``phi_key_proj.*``, ``phi_query_proj.*``, ``core_experts.*`` and ``univ_experts.*`` (:class:`ExpertMLP`).

    Args:
        dim: width D.
        spec: options.
        phi: queries shared with other layers; own ones when None.

    Raises:
        SpecError: heads that do not divide D, or a hidden width that rounds to 0.
    """

    spec: SpheroSpec

    def __init__(self, dim: int, spec: SpheroSpec, phi: nn.Parameter | None = None) -> None:
        super().__init__(dim, spec, spec.num_experts, spec.num_heads or 1)
        head_dim = dim // self.num_heads
        if not spec.input_as_phi:
            own = semi_orthogonal(spec.num_experts, spec.slots_per_expert, dim) if phi is None else phi
            self.phi = own if isinstance(own, nn.Parameter) else nn.Parameter(own)
        self.slot_norm = nn.LayerNorm(head_dim) if spec.slot_layernorm else None
        start = torch.tensor(_raw(spec.temperature, spec.temperature_form))
        count = 2 if spec.temperatures == "two" else 1
        self.scales = nn.ParameterList(
            [nn.Parameter(start.clone(), requires_grad=spec.learn_temperature) for _ in range(count)]
        )
        self.phi_key_proj = key_map(spec, head_dim)
        self.phi_query_proj = Affine(dim) if spec.query_proj == "affine" else None
        self.core_experts = self._experts(spec.core_experts, spec.compress_ratio)
        self.univ_experts = self._experts(spec.univ_experts, spec.univ_factor * spec.compress_ratio)

    def _experts(self, count: int, ratio: float) -> ExpertMLP | None:
        spec = self.spec
        if count == 0:
            return None
        width = hidden_width(self.dim, ratio)
        return ExpertMLP(self.dim, width, count, drop=spec.drop, drop_act=spec.drop_act, init=spec.expert_init)

    def groups(self) -> dict[str, tuple[int, int]]:
        """See the base class."""
        core = self.spec.core_experts
        named = {"core": (0, core), "univ": (core, self.num_experts)}
        return {name: span for name, span in named.items() if span[0] < span[1]}

    def temperatures(self) -> tuple[Tensor, Tensor]:
        """Temperatures of dispatch and combine."""
        values = []
        for raw in self.scales:
            value = raw
            if self.spec.temperature_form == "exp":
                value = raw.exp()
            elif self.spec.temperature_form == "softplus":
                value = F.softplus(raw)
            floor = self.spec.temperature_floor
            values.append(value if floor is None else value.clamp_min(floor))
        return values[0], values[-1]

    def temperature_values(self) -> tuple[float, ...]:
        """See the base class."""
        return tuple(float(value.detach()) for value in self.temperatures())

    def set_temperatures(self, *values: float) -> None:
        """Set the temperatures, for a schedule (:func:`temperature_schedule`): one value for all, or one each.

        Raises:
            SpecError: values that are not positive, or another number of them.
        """
        if len(values) not in (1, len(self.scales)) or not all(value > 0 for value in values):
            raise SpecError(f"Temperatures {values} cannot be set.", f"Give 1 or {len(self.scales)} positive numbers.")
        with torch.no_grad():
            for raw, value in zip(self.scales, values * len(self.scales), strict=False):
                raw.fill_(_raw(value, self.spec.temperature_form))

    def route(self, x: Tensor, draws: Draws) -> Mix:
        """See the base class."""
        spec = self.spec
        scores = self._scores(x)
        noise = self.noise(scores, draws)
        scores = self.mask_scores(scores, draws)
        dispatch_scale, combine_scale = self.temperatures()
        if noise is not None and spec.noise_position == "before":
            scores, noise = scores + noise, None
        weights = torch.softmax(_scaled(scores, dispatch_scale, noise), dim=-2)
        combine = _scaled(scores, combine_scale, noise)
        return Mix(weights, entmax15(combine) if spec.combine == "entmax15" else combine.softmax(dim=-1))

    def _scores(self, x_BND: Tensor) -> Tensor:
        """Cosines of keys and queries ``[B, (h,) N, Q]``."""
        queries = adjust_query_length(x_BND, self.num_slots) if self.spec.input_as_phi else self.phi.flatten(0, 1)
        queries = queries.to(x_BND.dtype)
        if self.phi_query_proj is not None:
            queries = self.phi_query_proj(queries)
        if self.num_heads > 1:
            queries = queries.view(*queries.shape[:-1], self.num_heads, -1).transpose(-3, -2)
        if self.slot_norm is not None:
            queries = self.slot_norm(queries)
        keys = self.split(x_BND)
        if self.phi_key_proj is not None:
            keys = self.phi_key_proj(keys)
        if self.spec.keys == "sphere":
            keys = unit(keys)
        scores = scores_of(keys, unit(queries))
        return scores / math.sqrt(self.dim) if self.spec.input_as_phi else scores

    def process(self, slots_BQD: Tensor, draws: Draws) -> Tensor:
        """See the base class."""
        slots_BESD = slots_BQD.view(len(slots_BQD), self.num_experts, -1, self.dim)
        core = self.spec.core_experts
        parts = []
        for name, piece in (("core_experts", slots_BESD[:, :core]), ("univ_experts", slots_BESD[:, core:])):
            experts = cast("ExpertMLP | None", getattr(self, name))
            if experts is not None:
                parts.append(experts(piece, draws.below(name)))
        out_BESD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out_BESD.flatten(1, 2)


def temperature_schedule(step: int, total: int, start: float, end: float) -> float:
    """Geometric way from ``start`` to ``end``; the paper lets the temperature fall from a large start.

    Args:
        step: from 0; beyond ``total`` it stays at the end.
        total: steps of the way, at least 1.
        start: > 0.
        end: > 0.
    """
    progress = min(1.0, step / max(1, total))
    return float(start * (end / start) ** progress)


def _scaled(scores: Tensor, temperature: Tensor, noise: Tensor | None) -> Tensor:
    inverse = temperature.to(scores.dtype).reciprocal()
    return scores * inverse if noise is None else torch.addcmul(noise, scores, inverse)


def _raw(temperature: float, form: str) -> float:
    """The parameter that gives this temperature."""
    if form == "exp":
        return math.log(temperature)
    return math.log(math.expm1(temperature)) if form == "softplus" else temperature
