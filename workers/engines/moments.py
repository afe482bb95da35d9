"""Reading and writing an optimiser's moments by parameter, whether or not ZeRO has divided them over the ranks.

With ZeRO 1 and 2 the torch optimiser holds one flat piece per group and rank, and DeepSpeed's ``safe_*`` functions
translate. Without ZeRO it holds the parameters themselves. The package is handed in: only the engine imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Moments:
    """Moments of one optimiser.

    Args:
        optimizer: the torch optimiser.
        zero: ZeRO's wrapper around it; None without ZeRO.
        utils: ``deepspeed.utils``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, zero: Any, utils: Any) -> None:
        self._optimizer, self._zero, self._utils = optimizer, zero, utils

    def step(self) -> Tensor:
        """Updates since the last reset, scalar."""
        for state in self._optimizer.state.values():
            found: Tensor = state.get("step", torch.tensor(0.0))
            return found.detach().cpu()
        return torch.tensor(0.0)

    def zero(self) -> None:
        """Zero moments at step 0: what a new optimiser starts from."""
        for slots in self._optimizer.state.values():
            for value in slots.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def read(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Slot -> parameter name of this rank -> whole moment. Empty before the first step. Collective with ZeRO."""
        slots: list[str] = []
        for state in self._optimizer.state.values():
            slots = [name for name, value in state.items() if name != "step" and value is not None]
            break
        if slots:
            self._link()
        parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        return {slot: {name: self._moment(p, slot) for name, p in parameters} for slot in slots}

    def write(self, module: nn.Module, moments: Mapping[str, Mapping[str, Tensor]], step: float) -> None:
        """Set weights (ZeRO's master copy) and moments of this rank's parameters; missing moments become zeros."""
        slots = sorted({slot for found in moments.values() for slot in found if slot != "step"})
        self._prepare(slots, step, any("step" in found for found in moments.values()))
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._zero is not None:
                self._utils.safe_set_full_fp32_param(parameter, parameter.detach())
            for slot, value in moments[name].items():
                if slot == "step":
                    continue
                if self._zero is None:
                    self._optimizer.state[parameter][slot].copy_(value)
                else:
                    self._utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), slot)

    def _moment(self, parameter: nn.Parameter, slot: str) -> Tensor:
        if self._zero is None:
            found = self._optimizer.state.get(parameter, {}).get(slot)
            return torch.zeros_like(parameter) if found is None else found
        value: Tensor = self._utils.safe_get_full_optimizer_state(parameter, slot)
        return value

    def _prepare(self, slots: list[str], step: float, counted: bool) -> None:
        """Give every tensor of the optimiser zero moments at ``step``, so that they can be filled in place."""
        self._optimizer.state.clear()
        if not slots:
            return
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:
                self._optimizer.state[tensor] = {slot: torch.zeros_like(tensor) for slot in slots}
                if counted:
                    self._optimizer.state[tensor]["step"] = torch.tensor(step, device=tensor.device)
        self._link()

    def _link(self) -> None:
        """ZeRO links moments to parameters once, after the step of the first group: too early for the others."""
        if self._zero is not None:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
