"""The engine contract: one optimiser step, and state by parameter name.

An engine owns module, optimiser and communication between ranks. The loop (``workers.loop``) owns everything that is a
function of the step: batches, learning rates, evaluation, checkpoints. State is keyed by parameter name and complete
on rank 0, so that a checkpoint written by W ranks resumes on any other number of ranks and under the other engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from moe.errors import RunFailed, SpecError, nearest

Precision = Literal["fp32", "bf16"]
LossFunction = Callable[[nn.Module, Any], Any]
"""``(module, batch) -> Losses`` (scalar ``.total``, ``.parts`` name -> scalar tensor); a plain tensor also works."""

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Weighted:
    """One micro-batch with its share of the step's loss.

    The loss of a step is the sum of ``weight * loss`` over the micro-batches of ALL ranks; the weights therefore add up
    to 1 over the ranks. A weight of 0 keeps collective calls aligned on a rank that has less to do.
    """

    batch: Any
    weight: float


def weighted(microbatches: Sequence[Any], world_size: int) -> list[Weighted]:
    """``microbatches`` as :class:`Weighted`; plain ones share the step equally over all ranks."""
    if all(isinstance(item, Weighted) for item in microbatches):
        return list(microbatches)
    return [Weighted(item, 1.0 / (len(microbatches) * world_size)) for item in microbatches]


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: key of schedules and of the printed rates.
        parameters: the tensors; every one is a parameter of the engine's module.
        lr: base rate; the schedule multiplies it.
        weight_decay: L2 for Adam and SGD, decoupled for AdamW.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerOptions:
    """Which optimiser, and how a step is computed.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd``.
        betas: of Adam and AdamW.
        eps: of Adam and AdamW.
        momentum: of SGD.
        clip: largest global gradient norm; None means no clipping.
        precision: ``bf16`` runs forward and backward under autocast; parameters, moments and updates stay fp32,
            because an inner step of 1e-4 times a gradient is below the resolution of bf16 weights.
    """

    name: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    clip: float | None = None
    precision: Precision = "fp32"


@dataclass
class EngineState:
    """Everything an engine needs to go on, by parameter name, fp32, on the CPU, independent of the number of ranks.

    Attributes:
        module: weights and buffers, as in ``module.state_dict()`` of the plain module.
        optimizer: parameter name -> slot (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``, ``step``) -> tensor.
    """

    module: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


class Engine(Protocol):
    """What the loop drives.

    Attributes:
        module: the module being trained, in this rank's layout.
        rank: number of this rank, from 0.
        world_size: number of ranks.
        device: where batches must be.
    """

    module: nn.Module
    rank: int
    world_size: int
    device: torch.device

    def step(self, microbatches: Sequence[Any], loss_fn: LossFunction) -> dict[str, float]:
        """Forward, backward, exchange, clip, update. Returns the loss (``loss``) and its parts, equal on all ranks."""
        ...

    def set_rates(self, multipliers: Mapping[str, float]) -> dict[str, float]:
        """Set each group's rate to ``base * multiplier`` (1 for groups not named); returns the rates by group."""
        ...

    def reset_optimizer(self) -> None:
        """Forget all moments, as if the optimiser had just been made."""
        ...

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors keyed and laid out like this rank's parameters -> whole-model tensors by plain name. Collective."""
        ...

    def scatter(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inverse of :meth:`gather`: this rank's part of whole-model tensors."""
        ...

    def state_dict(self) -> EngineState:
        """Collective: every rank calls it, every rank gets the whole state."""
        ...

    def load_state_dict(self, state: EngineState) -> None:
        """Continue from ``state``, whatever the number of ranks that wrote it. Raises CheckpointError on a mismatch."""
        ...

    def plain(self) -> nn.Module:
        """The module with the current weights in the plain layout, for evaluation on one rank alone. Collective."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def destroy(self) -> None:
        """Release hooks and process-wide resources; the module stays usable."""
        ...


def build_optimizer(groups: Sequence[ParamGroup], options: OptimizerOptions) -> torch.optim.Optimizer:
    """A plain torch optimiser over named groups (``group["name"]``, ``group["base_lr"]``).

    Raises:
        SpecError: the optimiser is unknown.
    """
    dicts: list[dict[str, Any]] = [
        {
            "params": [p for p in group.parameters if p.requires_grad],
            "name": group.name,
            "label": group.name,  # DeepSpeed renames the groups that it splits off
            "lr": group.lr,
            "base_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    dicts = [group for group in dicts if group["params"]]
    # One pass over the memory instead of seven: a tenth of the time on a CPU.
    if options.name == "adam":
        return torch.optim.Adam(dicts, betas=options.betas, eps=options.eps, fused=True)
    if options.name == "adamw":
        return torch.optim.AdamW(dicts, betas=options.betas, eps=options.eps, fused=True)
    if options.name == "sgd":
        return torch.optim.SGD(dicts, momentum=options.momentum, fused=True)
    raise SpecError(f"There is no optimiser named {options.name!r}.", nearest(options.name, OPTIMIZERS))


def read_losses(losses: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``(total, named parts)`` of what a loss function returned."""
    if isinstance(losses, torch.Tensor):
        return losses, {}
    return losses.total, dict(losses.parts)


def require_finite(values: Mapping[str, float]) -> None:
    """Stop the run when the loss is not a number (RunFailed)."""
    if not torch.isfinite(torch.tensor(values["loss"])):
        parts = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        raise RunFailed(f"The loss is not finite ({parts}).", "Lower the learning rate, set a clip, or use fp32.")


@contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """The precision of forward passes: nothing for fp32, bf16 autocast for bf16."""
    if precision == "fp32":
        yield
        return
    # The weight cache keeps bf16 copies across the inner step, where the weights are no longer the same tensors.
    with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
        yield
