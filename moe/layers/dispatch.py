"""Tokens to experts and back: sort the kept choices by expert, and put weighted results where they came from.

Where the executor needs the counts by expert on the host, they are read once per layer (:func:`read_counts`), together
with whatever else the caller wants to know. Otherwise they stay on the device: dropped choices then travel behind the
last group instead of being left out, so that no size depends on data.

Shapes: N tokens, D width, E experts, K choices per token, M kept choices (M = N * K when nothing is dropped), C seats.
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
        counts: tokens by expert, on the host or on the device; their sum is M, or less when dropped choices travel
            behind the groups.
        slot_NK: row of ``tokens_MD`` that holds this choice, M for one that was left out.
        choice_M: int64, number ``n * K + k`` of the choice in each row of ``tokens_MD``.
    """

    tokens_MD: Tensor
    counts: list[int] | Tensor
    slot_NK: Tensor
    choice_M: Tensor


def read_counts(counts_E: Tensor, *flags: Tensor) -> tuple[list[int], list[bool]]:
    """Counts by expert and scalar truth values, on the host, in one transfer."""
    values: list[int] = torch.cat([counts_E, *(flag.reshape(1).to(counts_E.dtype) for flag in flags)]).tolist()
    return values[: len(counts_E)], [bool(value) for value in values[len(counts_E) :]]


def dispatch(
    x_ND: Tensor, routing: Routing, counts: list[int] | Tensor | None = None, weights_NK: Tensor | None = None
) -> Dispatch:
    """Group the tokens by the expert that they go to.

    Args:
        x_ND: tokens.
        routing: the decision.
        counts: ``routing.counts_E`` itself to leave it on the device, or as a list when the caller has read it already;
            read here when left out.
        weights_NK: factor of each choice's token, for weights that act before the expert.
    """
    tokens, top_k = routing.experts_NK.shape
    counts = read_counts(routing.counts_E)[0] if counts is None else counts
    key = routing.experts_NK.reshape(-1)
    kept = key.numel() if isinstance(counts, Tensor) else sum(counts)
    if routing.capacity is not None or kept < key.numel():
        # Dropped choices get the number after the last expert, so that the stable sort puts them behind all others.
        key = torch.where(routing.kept_NK.reshape(-1), key, len(counts))
    order = key.sort(stable=True).indices[:kept]
    slot = torch.full((tokens * top_k,), kept, dtype=torch.long, device=x_ND.device)
    slot[order] = torch.arange(kept, device=x_ND.device)
    x_MD = x_ND.index_select(0, order if top_k == 1 else order // top_k)
    if weights_NK is not None:
        x_MD = x_MD * weights_NK.reshape(-1).index_select(0, order).unsqueeze(1).to(x_MD.dtype)
    return Dispatch(x_MD, counts, slot.view(tokens, top_k), order)


def combine(y_MD: Tensor, sent: Dispatch, weights_NK: Tensor | None) -> Tensor:
    """Weighted sum ``[N, D]`` of the experts' results, accumulated in the wider of both types (float32 or wider).

    A token whose choices were all dropped gets zeros. Without weights every kept choice counts once; rows behind the
    groups must then be zero, as ``moe.layers.kernels`` leaves them.
    """
    tokens, top_k = sent.slot_NK.shape
    if y_MD.shape[0] < tokens * top_k:
        y_MD = torch.cat([y_MD, y_MD.new_zeros(1, y_MD.shape[1])])
    y_NKD = y_MD.index_select(0, sent.slot_NK.reshape(-1)).view(tokens, top_k, y_MD.shape[1])
    if weights_NK is None:
        return y_NKD.sum(dim=1, dtype=torch.promote_types(y_MD.dtype, torch.float32))
    if top_k == 1:
        return y_NKD.squeeze(1) * weights_NK
    return (y_NKD * weights_NK.unsqueeze(-1)).sum(dim=1)
