"""Executors: one small network per expert, on one rank or over several.

An executor maps tokens grouped by expert to results in the same order. :class:`LocalExperts` holds all experts;
:class:`ExpertParallel` holds a share of them and sends tokens to the ranks that hold the others. Parameters are named
by GLOBAL expert number in both (``<number>.w1.weight``, ...), so that checkpoints do not depend on the ranks. Both
stand on the kernels of ``moe.layers.kernels``, as the stacked :class:`moe.layers.experts.Experts` does.

Shapes: M tokens grouped by expert, D width, H hidden, E experts, R ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.layers.activation import check_activation
from moe.layers.kernel_choice import Kernel
from moe.layers.kernels import expert_ffn


class Expert(nn.Module):
    """Linear - activation - Linear with an output that starts at zero.

    Also the ``expert`` argument of ``deepspeed.moe.layer.MoE``, which makes deep copies of it: load weights by name
    afterwards, or all experts begin alike.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, dim)
        # The student block is residual: a zero output leaves a dense parent's function untouched at the start.
        nn.init.zeros_(self.w2.weight)
        nn.init.zeros_(self.w2.bias)

    def forward(self, x_MD: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``; rows are independent, and none at all is allowed."""
        rows_MD = x_MD.reshape(-1, x_MD.shape[-1])
        return run_experts([self], rows_MD, [rows_MD.shape[0]]).reshape(x_MD.shape)


def run_experts(experts: list[Expert], x_MD: Tensor, counts: list[int], kernel: Kernel = "loop") -> Tensor:
    """Apply expert e, a module of its own, to its group of rows.

    Args:
        experts: E experts of equal sizes and activation.
        x_MD: rows grouped by expert, ascending.
        counts: rows of each expert; sum M.
        kernel: ``loop`` takes one expert after the other and copies no weights; the others stack the weights first.

    Experts without rows take part with an empty group, so that their gradients are zeros and never missing.
    """
    if kernel == "loop":
        groups = zip(experts, torch.split(x_MD, counts), strict=True)
        parts = [
            expert_ffn(
                rows, [rows.shape[0]], e.w1.weight[None], e.w1.bias[None], e.w2.weight[None], e.w2.bias[None],
                e.activation, kernel="loop",
            )
            for e, rows in groups
        ]  # fmt: skip
        return torch.cat(parts)
    w1_EHD, w2_EOH = (torch.stack([getattr(e, layer).weight for e in experts]) for layer in ("w1", "w2"))
    b1_EH, b2_EO = (torch.stack([getattr(e, layer).bias for e in experts]) for layer in ("w1", "w2"))
    return expert_ffn(x_MD, counts, w1_EHD, b1_EH, w2_EOH, b2_EO, experts[0].activation, kernel=kernel)


class ExpertExecutor(Protocol):
    """Computes all experts' results for tokens grouped by global expert number."""

    def __call__(self, x_MD: Tensor, counts: list[int]) -> Tensor:
        """Rows grouped by expert, rows per expert -> results in the same order ``[M, D]``."""
        ...


class LocalExperts(nn.ModuleList):
    """All experts on this rank."""

    def __init__(
        self, dim: int, hidden: int, num_experts: int, kernel: Kernel = "loop", activation: str = "gelu"
    ) -> None:
        super().__init__(Expert(dim, hidden, activation) for _ in range(num_experts))
        self.kernel: Kernel = kernel

    def forward(self, x_MD: Tensor, counts: list[int]) -> Tensor:
        """See :class:`ExpertExecutor`."""
        return run_experts(list(self), x_MD, counts, self.kernel)  # type: ignore[arg-type]


class TokenExchange(Protocol):
    """Collective calls that :class:`ExpertParallel` is given from outside (gloo, NCCL, ...)."""

    def counts(self, send_RE: Tensor) -> Tensor:
        """All-to-all of the rows announced by each rank: ``[R, E/R]`` to send -> ``[R, E/R]`` to receive."""
        ...

    def __call__(self, x_MD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """All-to-all of rows, differentiable (twice for second-order meta-training): rows per rank in and out."""
        ...


class ExpertParallel(nn.ModuleDict):
    """The experts ``rank * E/R .. (rank + 1) * E/R - 1`` of E, on rank ``rank`` of R.

    Gives the numbers of :class:`LocalExperts`: rows travel unchanged, each expert sees its rows in rank order.

    Args:
        dim: width D.
        hidden: hidden width H.
        num_experts: E over all ranks; a multiple of ``world_size``.
        rank: this rank.
        world_size: ranks R.
        exchange: the collective calls.
        kernel: see :func:`run_experts`.
        activation: by name.

    Raises:
        SpecError: E is not a multiple of R.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        rank: int,
        world_size: int,
        exchange: TokenExchange,
        kernel: Kernel = "loop",
        activation: str = "gelu",
    ) -> None:
        if num_experts % world_size:
            raise SpecError(f"{num_experts} experts cannot be shared equally by {world_size} ranks.")
        self.local = num_experts // world_size
        super().__init__({str(rank * self.local + e): Expert(dim, hidden, activation) for e in range(self.local)})
        self.world_size = world_size
        self.exchange = exchange
        self.kernel: Kernel = kernel

    def forward(self, x_MD: Tensor, counts: list[int]) -> Tensor:
        """See :class:`ExpertExecutor`. Collective: every rank calls it equally often."""
        send_RE = torch.tensor(counts, dtype=torch.long, device=x_MD.device).view(self.world_size, self.local)
        receive_RE = self.exchange.counts(send_RE)
        send, receive = send_RE.sum(1).tolist(), receive_RE.sum(1).tolist()
        arrived = self.exchange(x_MD, send, receive)
        # Rows arrive grouped by (rank, expert); the kernel wants (expert, rank).
        expert_of = torch.arange(self.local, device=x_MD.device).repeat(self.world_size)
        order = expert_of.repeat_interleave(receive_RE.reshape(-1)).sort(stable=True).indices
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        experts: list[Expert] = list(self.values())  # type: ignore[arg-type]
        y_MD = run_experts(experts, arrived.index_select(0, order), receive_RE.sum(0).tolist(), self.kernel)
        return self.exchange(y_MD.index_select(0, back), receive, send)
