"""The plain engine for tuned text networks: gates follow their experts, and checkpoints leave out frozen weights.

A low-rank run of a large network trains a thousandth of it; its checkpoints and artifacts hold that part alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from moe.errors import CheckpointError
from moe.models.emoe_blocks import update_gates
from workers.engines.base import EngineState, LossFunction, OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine


class TextEngine(TorchEngine):
    """See :class:`workers.engines.torch.TorchEngine`.

    Args:
        module: the network.
        groups: trainable parameters by rate.
        options: optimiser.
        kept: names of the state entries that checkpoints hold; the others never change.
        device: where to train.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        options: OptimizerOptions,
        kept: Set[str],
        device: torch.device | None = None,
    ) -> None:
        super().__init__(module, groups, options, device)
        self._kept = kept

    def step(self, microbatches: Sequence[Any], loss_fn: LossFunction) -> dict[str, float]:
        """See the protocol; afterwards every avg-k gate moves to its experts' mean keys."""
        values = super().step(microbatches, loss_fn)
        update_gates(self.module)
        return values

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the CPU of what may have changed."""
        return super().gather({name: value for name, value in tensors.items() if name in self._kept})

    def load_state_dict(self, state: EngineState) -> None:
        """See the protocol; frozen weights stay as they are."""
        if state.module.keys() != self._kept:
            odd = sorted(state.module.keys() ^ self._kept)
            raise CheckpointError(f"The checkpoint holds other tensors than this run trains, e.g. {odd[0]}.")
        own = {name: value for name, value in self.module.state_dict().items() if name not in self._kept}
        super().load_state_dict(EngineState({**own, **state.module}, state.optimizer))
