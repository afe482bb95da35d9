"""Plain PyTorch engine: one process, or several with a flattened gradient sum.

``DistributedDataParallel`` is not used: its hooks assume one backward pass per forward of the wrapped module, while a
meta step differentiates through functional copies of the parameters (second order). One all-reduce of the flattened
gradients after the last micro-batch is simple and exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from moe.errors import CheckpointError, SpecError
from workers.engines.base import (
    EngineState,
    LossFunction,
    OptimizerOptions,
    ParamGroup,
    autocast,
    build_optimizer,
    read_losses,
    weighted,
)


class TorchEngine:
    """See :class:`workers.engines.base.Engine`.

    Args:
        module: the module to train; moved to ``device``.
        groups: its trainable parameters by learning rate.
        options: optimiser, clipping and precision.
        device: where to train.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        options: OptimizerOptions,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.module = module.to(self.device)
        self.options = options
        self.optimizer = build_optimizer(groups, options)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self._names = _parameter_names(module, self.optimizer)

    def set_rates(self, multipliers: Mapping[str, float]) -> dict[str, float]:
        """See the protocol."""
        return set_rates(self.optimizer, multipliers)

    def step(self, microbatches: Sequence[Any], loss_fn: LossFunction) -> dict[str, float]:
        """See the protocol."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for item in weighted(microbatches, self.world_size):
            with autocast(self.device, self.options.precision):
                total, parts = read_losses(loss_fn(self.module, item.batch))
            (total * item.weight).backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": total, **parts}.items():
                share = value.detach().double() * item.weight
                sums[name] = sums[name] + share if name in sums else share
        values = reduce_values(sums, self.world_size, self.device)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.world_size > 1:
            _sum_gradients(parameters)
            self._average_statistics()
        if self.options.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.clip)
            values["grad_norm"] = float(norm)
        self.optimizer.step()
        return values

    def _average_statistics(self) -> None:
        """BatchNorm statistics differ between ranks while training; keep one set, the mean."""
        for layer in self.module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
                for buffer in layer.buffers():
                    if buffer.is_floating_point():
                        dist.all_reduce(buffer)
                        buffer.div_(self.world_size)

    def reset_optimizer(self) -> None:
        """See the protocol."""
        self.optimizer.state.clear()

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every rank holds the whole model: a copy on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in tensors.items()}

    def scatter(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every rank holds the whole model: the same tensors on its device."""
        return {name: value.to(self.device) for name, value in tensors.items()}

    def state_dict(self) -> EngineState:
        """See the protocol."""
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for parameter, slots in self.optimizer.state.items():
            name = self._names[cast(nn.Parameter, parameter)]
            moments[name] = {key: _as_tensor(value) for key, value in slots.items() if value is not None}
        return EngineState(module=self.gather(self.module.state_dict()), optimizer=moments)

    def load_state_dict(self, state: EngineState) -> None:
        """See the protocol."""
        load_strict(self.module, state.module)
        self.optimizer.state.clear()
        by_name = {name: parameter for parameter, name in self._names.items()}
        for name, slots in state.optimizer.items():
            if name not in by_name:
                raise CheckpointError(
                    f"The checkpoint has optimiser state for {name!r}, which this model does not train.",
                    "Start the stage afresh (delete its scratch folder) after changing the model.",
                )
            parameter = by_name[name]
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in slots.items()
            }

    def plain(self) -> nn.Module:
        """The module itself."""
        return self.module

    def barrier(self) -> None:
        """See the protocol."""
        if self.world_size > 1:
            dist.barrier()

    def destroy(self) -> None:
        """Nothing to release."""


def set_rates(optimizer: torch.optim.Optimizer, multipliers: Mapping[str, float]) -> dict[str, float]:
    """Set ``lr = base_lr * multiplier`` per named group; ``"*"`` applies to all groups. Returns the rates."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = group["label"]
        group["lr"] = group["base_lr"] * multipliers.get(name, multipliers.get("*", 1.0))
        rates[name] = group["lr"]
    return rates


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str = "The checkpoint") -> None:
    """``module.load_state_dict`` with one readable message.

    Raises:
        CheckpointError: names missing, unexpected and wrongly shaped tensors.
    """
    own = module.state_dict()
    problems: list[str] = []
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    for label, names in (("missing", missing), ("unexpected", extra), ("wrong shape", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{label}: {', '.join(names[:5])}{more}")
    if problems:
        raise CheckpointError(f"{what} does not fit the model ({'; '.join(problems)}).", "Check backbone and settings.")
    module.load_state_dict(dict(tensors))


def reduce_values(sums: Mapping[str, torch.Tensor], world_size: int, device: torch.device) -> dict[str, float]:
    """Weighted sums of the losses over all ranks, as floats.

    Args:
        sums: name -> float64 scalar; the same names in the same order on all ranks.
        world_size: number of ranks.
        device: where collectives run.
    """
    stacked = torch.stack([value.to(device) for value in sums.values()])
    if world_size > 1:
        dist.all_reduce(stacked)
    return dict(zip(sums, stacked.tolist(), strict=True))


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """All-reduce gradients as one flat vector.

    A parameter without a gradient on every rank keeps none (Adam must not touch the aggregator's unused head); the
    trailing entries of the vector carry that information.
    """
    device = parameters[0].device
    has = torch.tensor([0.0 if p.grad is None else 1.0 for p in parameters], device=device)
    pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]
    flat = torch.cat([*pieces, has])
    dist.all_reduce(flat)
    offset = 0
    for parameter, used in zip(parameters, flat[-len(parameters) :].tolist(), strict=True):
        size = parameter.numel()
        if used:
            parameter.grad = flat[offset : offset + size].view_as(parameter).to(parameter.dtype)
        offset += size


def _parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    strangers = [p for group in optimizer.param_groups for p in group["params"] if p not in names]
    if strangers:
        raise SpecError(f"{len(strangers)} parameters of the optimiser groups are not part of the module.")
    return names


def _as_tensor(value: Any) -> torch.Tensor:
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    return tensor.detach().cpu().clone()
