"""A :class:`moe.layers.layer.MoELayer` in the parts that DeepSpeed's expert-parallel layer is made of.

DeepSpeed moves the tokens (two all-to-alls over fixed seats); our gate, router and kernels decide and compute, so that
every rule of ``moe.router_spec.RouterSpec`` works over ranks and gives the numbers of the plain layer. Plain PyTorch:
the package itself is imported in ``workers.engines.deepspeed`` only.

Shapes: N tokens of this rank, D width, E experts over all ranks, R ranks, L = E / R local experts, C seats.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.errors import SpecError
from moe.layers.experts import Experts
from moe.layers.gates import NoisyGate
from moe.layers.layer import LayerRecord, MoELayer
from moe.layers.router import draw_noise, route_tokens
from moe.layers.seating import seats


class RoutedGate(nn.Module):
    """Takes the place of DeepSpeed's gate: our routing, said in its terms (expert, seat and factor of each choice).

    Args:
        layer: the plain layer whose gate and rule are taken over.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.gate = copy.deepcopy(layer.gate)
        self.spec, self.num_experts = layer.spec, layer.num_experts
        self.group: Any = None
        self.last: LayerRecord | None = None

    def _set_ep_group(self, group: Any) -> None:
        """Called by DeepSpeed once the group of the ranks that share the experts exists."""
        self.group = group

    def forward(self, x_ND: Tensor, noise: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """DeepSpeed's sparse form: balance loss, seats C, E, experts [K, N] (-1: dropped), seats, factors, counts."""
        logits_NE = self.gate(x_ND)
        if noise is None:
            noise = draw_noise(self.spec, logits_NE, self.training)
        deviation_NE = self.gate.deviation(x_ND) if self.training and isinstance(self.gate, NoisyGate) else None
        routing, scores_NE = route_tokens(
            logits_NE, self.spec, training=self.training, noise=noise, deviation_NE=deviation_NE
        )
        self.last = LayerRecord(routing, scores_NE)
        seats_NK = seats(routing.experts_NK, self.num_experts) if routing.seats_NK is None else routing.seats_NK
        taken_NK = seats_NK.masked_fill(~routing.kept_NK, -1)
        # At least one seat, so that no rank sends nothing; all ranks must send equally many.
        room = torch.cat([taken_NK.reshape(-1) + 1, taken_NK.new_ones(1)]).max()
        if self.group is not None and dist.get_world_size(self.group) > 1:
            dist.all_reduce(room, dist.ReduceOp.MAX, group=self.group)
        experts_NK = routing.experts_NK.masked_fill(~routing.kept_NK, -1)
        return (
            routing.balance,
            room,
            self.num_experts,
            experts_NK.t(),
            seats_NK.t(),
            routing.weights_NK.t(),
            routing.counts_E,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the record of the last pass, which hangs on its graph."""
        return {**self.__dict__, "last": None}


class ExpertShare(Experts):
    """The L experts of one rank, on seats that arrived from all R ranks."""

    def forward(self, inputs_RLCD: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        """``[R, L, C, D]`` to the same shape."""
        ranks, local, seats_, width = inputs_RLCD.shape
        x_MD = inputs_RLCD.transpose(0, 1).reshape(-1, width)
        y_MD = super().forward(x_MD, [ranks * seats_] * local)
        return y_MD.view(local, ranks, seats_, width).transpose(0, 1)


def share_of(layer: MoELayer, ep_size: int, ep_rank: int) -> ExpertShare:
    """This rank's experts of ``layer``, with its weights.

    Raises:
        SpecError: E is not a multiple of ``ep_size``, or the layer weighs its inputs, which DeepSpeed's layer cannot.
    """
    experts = layer.experts
    if experts.num_experts % ep_size:
        raise SpecError(f"{experts.num_experts} experts cannot be shared equally by {ep_size} ranks.")
    if layer.spec.pre_score:
        raise SpecError("pre_score=true does not work over several ranks.", "Set it to false or ep_size to 1.")
    local = experts.num_experts // ep_size
    share = ExpertShare(
        local, experts.dim, experts.hidden, activation=experts.activation, dropout=experts.dropout,
        kernel=experts.row_kernel, out_dim=experts.out_dim, bias=(experts.b1 is not None, experts.b2 is not None),
        dropout_first=experts.dropout_first,
    )  # fmt: skip
    rows = slice(ep_rank * local, (ep_rank + 1) * local)
    share.load_state_dict({name: value[rows] for name, value in experts.state_dict().items()})
    return share.train(experts.training)


def layer_names(layer: MoELayer) -> dict[str, str]:
    """Names inside DeepSpeed's layer -> names inside :class:`MoELayer`; the experts' are this rank's part along E."""
    gate = {f"deepspeed_moe.gate.gate.{name}": f"gate.{name}" for name in layer.gate.state_dict()}
    return gate | {f"deepspeed_moe.experts.{name}": f"experts.{name}" for name in layer.experts.state_dict()}
