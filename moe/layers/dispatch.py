"""Tokens to experts and back: sort the kept choices by expert, and put weighted results where they came from.

Shapes: N tokens, D width, E experts, K choices per token, M kept choices (M = N * K when nothing is dropped).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.layers.router import Routing


class Dispatch(NamedTuple):
    """Where each choice went.

    Attributes:
        tokens_MD: the tokens of the kept choices, grouped by expert in ascending order, token order inside a group.
        counts: tokens by expert; their sum is M.
        slot_NK: row of ``tokens_MD`` that holds this choice, M for a dropped one.
    """

    tokens_MD: Tensor
    counts: list[int]
    slot_NK: Tensor


def dispatch(x_ND: Tensor, routing: Routing) -> Dispatch:
    """Group the tokens by the expert that they go to."""
    tokens, top_k = routing.experts_NK.shape
    counts: list[int] = routing.counts_E.tolist()
    kept = sum(counts)
    # Dropped choices get the number after the last expert, so that the stable sort puts them behind all others.
    key = torch.where(routing.kept_NK, routing.experts_NK, len(counts)).reshape(-1)
    order = key.sort(stable=True).indices[:kept]
    slot = torch.full((tokens * top_k,), kept, dtype=torch.long, device=x_ND.device)
    slot[order] = torch.arange(kept, device=x_ND.device)
    return Dispatch(x_ND.index_select(0, order // top_k), counts, slot.view(tokens, top_k))


def combine(y_MD: Tensor, sent: Dispatch, weights_NK: Tensor) -> Tensor:
    """Weighted sum ``[N, D]`` of the experts' results, accumulated in the weights' type.

    A token whose choices were all dropped gets zeros.
    """
    padded = torch.cat([y_MD, y_MD.new_zeros(1, y_MD.shape[1])])
    y_NKD = padded.index_select(0, sent.slot_NK.reshape(-1)).view(*sent.slot_NK.shape, y_MD.shape[1])
    return (y_NKD * weights_NK.unsqueeze(-1)).sum(dim=1)
