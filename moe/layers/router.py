"""Top-k softmax router: which experts see which token, with what weight, and how balanced the choice is.

Sources: GShard (arXiv 2006.16668, algorithm 1: first choices fill the slots before second ones, weights renormalised
over the chosen experts), Switch Transformer (arXiv 2101.03961, equations 2 and 4: one expert, plain probability,
balance loss). DeepSpeed's gate computes the same numbers, see ``moe.layers.block``.

Shapes: N tokens, D width, E experts, K choices per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """A routing decision.

    Attributes:
        experts_NK: int64, chosen experts, best first.
        weights_NK: float, factor of each chosen expert's output; 0 where the choice was dropped.
        kept_NK: bool, False where an expert had no slot left.
        balance: scalar balance loss, 1 when the load is uniform.
        counts_E: int64, kept choices by expert.
    """

    experts_NK: Tensor
    weights_NK: Tensor
    kept_NK: Tensor
    balance: Tensor
    counts_E: Tensor


def capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots per expert: ``ceil(tokens / experts * factor * top_k)``, at least 1."""
    return max(1, math.ceil(tokens / num_experts * factor * top_k))


def route(logits_NE: Tensor, top_k: int, slots: int | None = None) -> Routing:
    """Choose ``top_k`` experts per token.

    Args:
        logits_NE: gate scores, float32 or wider.
        top_k: choices K per token, 1..E. One choice is weighted by its probability, several are renormalised to sum
            to 1 over the choices that were kept.
        slots: most tokens an expert may take; None drops nothing, and then each token's result is independent of the
            other tokens.

    Returns:
        The decision. Equal scores are resolved towards the lower expert number, so it is deterministic.
    """
    experts = logits_NE.shape[1]
    gates_NE = logits_NE.softmax(dim=-1)
    chosen_NK = logits_NE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    kept_NK = _within(chosen_NK, experts, slots)
    weights_NK = gates_NE.gather(1, chosen_NK) * kept_NK
    if top_k > 1:
        floor = torch.finfo(weights_NK.dtype).eps
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True).clamp_min(floor)
    counts_E = F.one_hot(chosen_NK, experts).mul(kept_NK.unsqueeze(-1)).sum(dim=(0, 1))
    return Routing(chosen_NK, weights_NK, kept_NK, balance_loss(gates_NE, chosen_NK), counts_E)


def balance_loss(gates_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """``E * sum_e (mean gate of e) * (share of tokens that chose e)``; only the gates carry a gradient.

    The share counts first choices for K = 1 and 2 (Switch, GShard) and all choices, divided by K, above (DeepSpeed).
    """
    tokens, experts = gates_NE.shape
    top_k = chosen_NK.shape[1]
    if tokens == 0:
        return gates_NE.sum()
    counted = chosen_NK[:, :1] if top_k <= 2 else chosen_NK
    share_E = F.one_hot(counted, experts).sum(dim=1).to(gates_NE.dtype).mean(dim=0) / counted.shape[1]
    return experts * (gates_NE.mean(dim=0) * share_E).sum()


def _within(chosen_NK: Tensor, experts: int, slots: int | None) -> Tensor:
    """True where the choice comes early enough: all first choices in token order, then all second ones, and so on."""
    if slots is None:
        return torch.ones_like(chosen_NK, dtype=torch.bool)
    order = chosen_NK.t().reshape(-1)
    taken = F.one_hot(order, experts).cumsum(dim=0).gather(1, order.unsqueeze(1)).squeeze(1)
    return (taken <= slots).view(chosen_NK.shape[1], chosen_NK.shape[0]).t()


class Gate(nn.Linear):
    """Bias-free linear gate that always computes in float32 (or wider), also under autocast."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Scores ``[N, E]`` of tokens ``[N, D]``."""
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide))
