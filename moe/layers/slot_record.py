"""What a layer of slots did in a pass, as plain numbers that can be logged and compared.

Shapes: B batch, N tokens, E experts, S slots per expert, Q = E * S, D width; per head, a dimension h follows B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotRecord:
    """One pass of one layer; means are over samples, heads and tokens.

    Attributes:
        contribution: by expert, mean length of what it adds to a token.
        group_contribution: the same for groups of experts (core, universal) taken together.
        weight: by expert, mean combine weight; sums to 1.
        support: mean number of slots with a weight above zero in a token.
        support_min: smallest such number.
        support_max: largest such number.
        slot_entropy: mean entropy of a slot's dispatch weights over its largest possible value: 1 is a plain average of
            all tokens, 0 a copy of one.
        dead_experts: experts whose slots had weight zero in every token.
        temperatures: of dispatch and combine; empty where there are none.
    """

    contribution: tuple[float, ...]
    group_contribution: dict[str, float]
    weight: tuple[float, ...]
    support: float
    support_min: int
    support_max: int
    slot_entropy: float
    dead_experts: tuple[int, ...]
    temperatures: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def record(
    dispatch: Tensor,
    combine: Tensor,
    out: Tensor,
    slots: int,
    groups: Mapping[str, tuple[int, int]],
    temperatures: tuple[float, ...],
) -> SlotRecord:
    """The record of a pass.

    Args:
        dispatch: ``[B, (h,) N, Q]``, sums to 1 over N.
        combine: ``[B, (h,) N, Q]``.
        out: results of the slots ``[B, (h,) Q, d]``.
        slots: S.
        groups: name -> first and last (exclusive) expert.
        temperatures: to be kept.
    """
    tokens, experts = combine.shape[-2], combine.shape[-1] // slots
    out = out.to(combine.dtype)
    # |sum_s a_s o_s|^2 = sum_st a_s a_t <o_s, o_t>: no [N, E, D] tensor is needed.
    a = combine.reshape(*combine.shape[:-1], experts, slots)
    o = out.reshape(*out.shape[:-2], experts, slots, -1)
    lengths = torch.einsum("...nes,...net,...est->...ne", a, a, o @ o.mT).clamp_min(0).sqrt()
    parts = {
        name: (combine[..., first * slots : last * slots] @ out[..., first * slots : last * slots, :]).norm(dim=-1)
        for name, (first, last) in groups.items()
    }
    positive = combine > 0
    support = positive.sum(-1)
    entropy = torch.special.entr(dispatch).sum(-2) / (math.log(tokens) if tokens > 1 else 1.0)
    used_E = positive.reshape(-1, experts, slots).any(-1).any(0)
    return SlotRecord(
        contribution=tuple(lengths.flatten(0, -2).mean(0).tolist()),
        group_contribution={name: float(value.mean()) for name, value in parts.items()},
        weight=tuple(a.sum(-1).flatten(0, -2).mean(0).tolist()),
        support=float(support.float().mean()),
        support_min=int(support.min()),
        support_max=int(support.max()),
        slot_entropy=float(entropy.mean()),
        dead_experts=tuple(torch.nonzero(~used_E).flatten().tolist()),
        temperatures=temperatures,
    )
