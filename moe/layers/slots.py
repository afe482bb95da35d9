"""What layers of slots share: unit vectors, token maps, masks, and the pass tokens -> slots -> experts -> tokens.

A soft mixture of experts fills every slot with a weighted mean of all tokens, lets each expert process its slots, and
gives every token a weighted sum of all results. :class:`SlotLayer` is that pass; ``soft_moe`` and ``sphero`` say how
the weights come about.

Known differences: maps of any height and width are restored (the released code assumes squares). The routing is
computed in float32 or wider, also under autocast.

Shapes: B batch, N tokens, D width, E experts, S slots per expert, Q = E * S slots (expert outermost), h heads,
d = D / h. Per head, a dimension h follows B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import RunFailed, SpecError
from moe.jetpack_specs import SlotSpec
from moe.layers.draws import NO_DRAWS, Draws, drop_samples
from moe.layers.gemm import matmul
from moe.layers.slot_experts import Affine
from moe.layers.slot_product import mixing_product
from moe.layers.slot_record import SlotRecord, record

EPS = 1e-6
_MASKED = -1e12


def unit(x: Tensor, eps: float = EPS) -> Tensor:
    """``x / (|x| + eps)`` along the last dimension; the zero vector stays zero, with a zero gradient of the norm."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (length + eps)


def adjust_query_length(x_BLD: Tensor, length: int) -> Tensor:
    """Tokens interpolated linearly to another number of them, every channel alone: ``[B, length, D]``."""
    return F.interpolate(x_BLD.transpose(1, 2), size=length, mode="linear", align_corners=False).transpose(1, 2)


class Mix(NamedTuple):
    """Weights between tokens and slots, ``[B, N, Q]`` each, or ``[B, h, N, Q]``.

    Attributes:
        dispatch: share of each token in a slot; sums to 1 over N.
        combine: share of each slot in a token; sums to 1 over Q.
    """

    dispatch: Tensor
    combine: Tensor


class SlotLayer(nn.Module):
    """A layer of slots in the place of a feed-forward network.

    Subclasses say how tokens and slots are weighted (:meth:`route`) and what the experts do (:meth:`process`).

    Args:
        dim: width D.
        spec: options.
        num_experts: E.
        num_heads: groups of channels that are routed apart; 1 for one.
    """

    def __init__(self, dim: int, spec: SlotSpec, num_experts: int, num_heads: int = 1) -> None:
        super().__init__()
        if dim % num_heads:
            raise SpecError(f"{num_heads} heads do not divide the width {dim}.", "Choose a divisor.")
        self.dim, self.spec = dim, spec
        self.num_experts, self.num_heads = num_experts, num_heads
        self.num_slots = num_experts * spec.slots_per_expert

    def route(self, x: Tensor, draws: Draws) -> Mix:
        """Weights for tokens ``[B, N, D]``, float32 or wider."""
        raise NotImplementedError

    def process(self, slots_BQD: Tensor, draws: Draws) -> Tensor:
        """The experts' results ``[B, Q, D]``."""
        raise NotImplementedError

    def groups(self) -> dict[str, tuple[int, int]]:
        """First and last (exclusive) expert of each named group, for the record."""
        return {"experts": (0, self.num_experts)}

    def temperature_values(self) -> tuple[float, ...]:
        """Temperatures for the record; empty where there are none."""
        return ()

    def forward(self, x: Tensor, draws: Draws = NO_DRAWS) -> Tensor:
        """Tokens ``[B, N, D]`` or maps ``[B, height, width, D]``, to the same shape.

        Args:
            x: floating type; at least one token.
            draws: random numbers to use instead of drawing.

        Raises:
            SpecError: another number of dimensions or another width, or no tokens.
            RunFailed: tokens that are not finite (not looked at inside ``torch.compile`` and ``torch.func``).
        """
        return self._run(x, draws)[0]

    def forward_with_record(self, x: Tensor, draws: Draws = NO_DRAWS) -> tuple[Tensor, SlotRecord]:
        """As :meth:`forward`, and what the router did, as plain numbers."""
        y, mix, out = self._run(x, draws)
        return y, record(
            mix.dispatch, mix.combine, out, self.spec.slots_per_expert, self.groups(), self.temperature_values()
        )

    def _run(self, x: Tensor, draws: Draws) -> tuple[Tensor, Mix, Tensor]:
        if x.ndim not in (3, 4) or x.shape[-1] != self.dim or x.shape[1:-1].numel() == 0:
            raise SpecError(
                f"Tokens have shape {tuple(x.shape)}.",
                f"Expected [B, N, {self.dim}] or [B, height, width, {self.dim}] with at least one token.",
            )
        x_BND = x.flatten(1, -2)
        _require_finite(x_BND)
        with torch.autocast(x.device.type, enabled=False):
            wide = x_BND.to(torch.promote_types(x.dtype, torch.float32))
            mix = self._drop_experts(self.route(wide, draws), draws)
        slots_BQD = self.merge(mixing_product(mix.dispatch.to(x.dtype).mT, self.split(x_BND)))
        out_BQD = self.process(slots_BQD, draws)
        out_BQD = drop_samples(out_BQD, self.spec.drop_path, self.training, draws.masks.get("expert_drop"))
        out = self.split(out_BQD)
        y_BND = self.merge(mixing_product(mix.combine.to(out.dtype), out))
        return y_BND.view(x.shape), mix, out

    def split(self, x_BND: Tensor) -> Tensor:
        """Channels into heads: ``[B, h, N, d]``; unchanged for one head."""
        if self.num_heads == 1:
            return x_BND
        return x_BND.view(*x_BND.shape[:2], self.num_heads, -1).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`split`."""
        return x if self.num_heads == 1 else x.transpose(1, 2).flatten(2)

    def noise(self, scores: Tensor, draws: Draws) -> Tensor | None:
        """Noise of the scores' shape ``[B, (h,) N, Q]``, scaled; None when there is none in this mode."""
        if not self.spec.noise or not (self.training or self.spec.noise_in_eval):
            return None
        if draws.noise is None:
            return torch.randn_like(scores).mul_(self.spec.noise_mult)
        if draws.noise.numel() != scores.numel():
            raise SpecError(
                f"Injected noise has shape {tuple(draws.noise.shape)}.",
                f"Expected {(*scores.shape[:-1], self.num_experts, self.spec.slots_per_expert)}.",
            )
        return draws.noise.reshape(scores.shape).to(scores) * self.spec.noise_mult

    def mask_scores(self, scores: Tensor, draws: Draws, always: bool = False) -> Tensor:
        """Scores with a share of the (token, slot) pairs masked; where all are masked, weights are uniform."""
        rate = self.spec.logit_dropout
        if rate == 0 or not (self.training or always):
            return scores
        mask = draws.masks.get("logit_drop")
        if mask is None:
            mask = torch.empty_like(scores).bernoulli_(rate)
        # Parity: -1e12 is added, in float32 whatever the type of the tokens, so it never becomes infinite.
        return scores + _MASKED * mask.reshape(scores.shape).to(scores)

    def _drop_experts(self, mix: Mix, draws: Draws) -> Mix:
        rate = self.spec.expert_dropout
        if rate == 0 or not self.training:
            return mix
        keep_BE = draws.masks.get("experts")
        if keep_BE is None:
            keep_BE = mix.combine.new_empty(mix.combine.shape[0], self.num_experts).bernoulli_(1 - rate)
        keep = keep_BE.to(mix.combine).repeat_interleave(self.spec.slots_per_expert, dim=1)
        combine = mix.combine * keep.view(keep.shape[0], *[1] * (mix.combine.ndim - 2), -1)
        if self.spec.expert_dropout_scale == "rescale":
            return mix._replace(combine=combine / (1 - rate))
        total = combine.sum(-1, keepdim=True)
        return mix._replace(combine=combine / torch.where(total > 0, total, 1.0))


def _require_finite(x_BND: Tensor) -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x_BND.is_meta:
        return
    values = x_BND.detach()
    # A sum is one cheap pass; only when it is not finite each entry is looked at.
    if bool(values.sum(dtype=torch.promote_types(x_BND.dtype, torch.float32)).isfinite()):
        return
    bad = (~torch.isfinite(values)).any(dim=-1)
    if bool(bad.any()):
        raise RunFailed(
            f"{int(bad.sum())} of {bad.numel()} tokens that reach a layer of slots are not finite, the first at "
            f"{tuple(torch.nonzero(bad)[0].tolist())} (input {tuple(x_BND.shape)}, {x_BND.dtype}).",
            "Look at the layers before it; try fp32 or clip the gradients.",
        )


def scores_of(keys: Tensor, queries: Tensor) -> Tensor:
    """Inner products ``[B, (h,) N, Q]`` of keys and queries.

    Args:
        keys: ``[B, (h,) N, d]``.
        queries: ``[Q, d]``, ``[h, Q, d]``, or one set per sample ``[B, (h,) Q, d]``.
    """
    if queries.ndim == 2:
        return matmul(keys.flatten(0, -2), queries.t()).view(*keys.shape[:-1], -1)
    return keys @ queries.mT


def key_map(spec: SlotSpec, dim: int) -> nn.Module | None:
    """The map of the tokens before routing, or None."""
    if spec.key_proj == "none":
        return None
    return Affine(dim) if spec.key_proj == "affine" else nn.Linear(dim, dim)


def hidden_width(dim: int, ratio: float) -> int:
    """Hidden width of an expert: ``int(4 * ratio * dim)``."""
    return int(4 * ratio * dim)


def semi_orthogonal(num_experts: int, slots: int, dim: int) -> Tensor:
    """Queries ``[E, S, D]`` whose matrix ``[E, S * D]`` has orthonormal rows, or columns where it is tall."""
    return nn.init.orthogonal_(torch.empty(num_experts, slots * dim)).view(num_experts, slots, dim)


def gaussian(num_experts: int, slots: int, dim: int) -> Tensor:
    """Queries ``[E, S, D]`` from a normal distribution of variance 1/D."""
    return torch.randn(num_experts, slots, dim) / math.sqrt(dim)
