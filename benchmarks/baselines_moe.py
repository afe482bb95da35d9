"""What a user would run instead of ``moe.layers.layer.MoELayer``: a naive loop, GShard's einsum, DeepSpeed's layer.

All are layers ``[T, D] -> [T, D]`` of E experts with a linear softmax gate, written as their sources write them and
only for comparison. Sources: GShard (arXiv 2006.16668, algorithm 2), DeepSpeed-MoE (arXiv 2201.05596).

Shapes: T tokens, D width, H hidden, E experts, K choices, C seats per expert.
"""

from __future__ import annotations

import contextlib
import io
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAPACITY = 1.5  # GMoE's own factor


def dense(dim: int, hidden: int) -> nn.Sequential:
    """The feed-forward network of a transformer block."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class NaiveLoop(nn.Module):
    """For each expert: find its tokens, take them, add the weighted results where they came from."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(dim, experts, bias=False), top_k
        self.experts = nn.ModuleList(dense(dim, hidden) for _ in range(experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Dropless mixture."""
        weights_TK, chosen_TK = self.gate(x_TD).softmax(-1).topk(self.top_k)
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            rows, choice = torch.where(chosen_TK == e)
            y_TD = y_TD.index_add(0, rows, expert(x_TD[rows]) * weights_TK[rows, choice, None])
        return y_TD


class GShardEinsum(nn.Module):
    """Dispatch and combine as products with one-hot tensors ``[T, E, C]``; tokens over capacity are dropped."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(dim, experts, bias=False), top_k
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.b1 = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)
        self.b2 = nn.Parameter(torch.zeros(experts, 1, dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Mixture of the tokens that found a seat."""
        experts = self.w1.shape[0]
        seats = self.top_k * int(CAPACITY * math.ceil(len(x_TD) / experts))
        weights_TK, chosen_TK = self.gate(x_TD).softmax(-1).topk(self.top_k)
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        combine_TEC = x_TD.new_zeros(len(x_TD), experts, seats)
        before_E = torch.zeros(experts, dtype=torch.long)
        for k in range(self.top_k):
            mask_TE = F.one_hot(chosen_TK[:, k], experts)
            place_T = ((mask_TE.cumsum(0) - 1 + before_E) * mask_TE).sum(1)
            before_E = before_E + mask_TE.sum(0)
            kept_T = (place_T < seats).to(x_TD.dtype)
            seat_TC = F.one_hot(place_T.clamp(max=seats - 1), seats).to(x_TD.dtype)
            factor_TE = mask_TE.to(x_TD.dtype) * (weights_TK[:, k] * kept_T).unsqueeze(1)
            combine_TEC = combine_TEC + torch.einsum("te,tc->tec", factor_TE, seat_TC)
        x_ECD = torch.einsum("tec,td->ecd", (combine_TEC > 0).to(x_TD.dtype), x_TD)
        h_ECH = F.gelu(torch.einsum("ecd,edh->ech", x_ECD, self.w1) + self.b1)
        y_ECD = torch.einsum("ech,ehd->ecd", h_ECH, self.w2) + self.b2
        return torch.einsum("tec,ecd->td", combine_TEC, y_ECD)


class DeepSpeedLayer(nn.Module):
    """``deepspeed.moe.layer.MoE`` in one process with gloo, with GMoE's capacity and without random choices."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        from workers.engines.deepspeed import start

        start(torch.device("cpu"))
        from deepspeed.moe.layer import MoE

        with contextlib.redirect_stdout(io.StringIO()):
            self.layer = MoE(
                dim,
                dense(dim, hidden),
                experts,
                k=top_k,
                capacity_factor=CAPACITY,
                min_capacity=0,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
            self.layer.set_deepspeed_parallelism()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Mixture of the tokens that found a seat."""
        y_TD: Tensor = self.layer(x_TD)[0]
        return y_TD
