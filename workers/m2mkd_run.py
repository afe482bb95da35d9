"""How a phase of m2mKD is run: settings of a stage, engine and ranks, the loop, scores over the ranks.

Rates by epoch, decay groups and clipping are the phase's; a run that was killed goes on from its checkpoint and writes
the same bytes, on the same number of ranks. On another number it differs by rounding and by the noise of dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from moe.algorithms.m2mkd import Method
from moe.errors import SpecError
from workers.batches import ImageReader
from workers.checkpoints import CheckpointDir
from workers.context import Context
from workers.datasets.base import DomainData, IntArray
from workers.engines.base import Engine, LossFunction, OptimizerOptions, ParamGroup, Weighted
from workers.engines.torch import TorchEngine
from workers.loop import Evaluate, Evaluation, FitResult, LoopSpec, every, fit, mix
from workers.train_model import logits_of, score_logits


@dataclass(frozen=True)
class RunSettings:
    """What the stages add to a phase.

    Attributes:
        splits: whose rows are trained on.
        val_split: whose rows are scored after every epoch.
        epochs: instead of the phase's; 0 trains nothing.
        select: ``last`` keeps the last state, as the ViT trainer does; ``best`` the best on ``val_split``.
        precision: ``fp32``, ``bf16``, or None: bf16 where the phase asks for mixed precision.
        eval_batch: images per forward pass of an evaluation.
        checkpoint_every: updates between checkpoints.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: decoding threads.
        take_blocks: of a deeper network in a file that a phase starts from, those that are taken.
        fresh_head: leave the head of such a file out.
        engine: ``torch`` or ``deepspeed``.
        zero_stage: what DeepSpeed divides over the ranks.
        ep_size: ranks that share the experts under DeepSpeed.
    """

    splits: tuple[str, ...] = ("train",)
    val_split: str = "val"
    epochs: int | None = None
    select: Literal["last", "best"] = "last"
    precision: Literal["fp32", "bf16"] | None = None
    eval_batch: int = 128
    checkpoint_every: int = 100
    device: str = "auto"
    threads: int = 0
    take_blocks: tuple[int, ...] = ()
    fresh_head: bool = False
    engine: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[0, 1, 2] = 1
    ep_size: int = 1


class Batches(Protocol):
    """Updates of a phase: number from 0 -> this rank's pieces, tuples whose last entry are the targets."""

    steps_per_epoch: int

    def __call__(self, step: int) -> Sequence[Weighted]:
        """The pieces of an update."""
        ...


@dataclass(frozen=True)
class Trained:
    """What :func:`run_phase` did: updates, state, history, and the images of one update."""

    steps: int
    state: Mapping[str, torch.Tensor]
    history: Sequence[Evaluation]
    batch_size: int

    def record(self) -> dict[str, Any]:
        """Part of an artifact's ``meta``."""
        last = self.history[-1].scores if self.history else {}
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "scores": {name: round(value, 6) for name, value in last.items()},
            "history": [{"step": e.step + 1, **{k: round(v, 6) for k, v in e.scores.items()}} for e in self.history],
        }


def ranks() -> tuple[int, int]:
    """This process's number among the ranks, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def run_phase(
    method: Method,
    network: nn.Module,
    images: Batches,
    settings: RunSettings,
    context: Context,
    device: torch.device,
    evaluate: Evaluate,
    metric: str,
    loss: LossFunction | None = None,
) -> Trained:
    """Train ``network`` through :func:`workers.loop.fit`; the trained state is in the result, and in ``network``.

    Args:
        method: the phase and its recipe.
        network: what is trained; equal weights on all ranks.
        images: what every update sees.
        settings: of the stage.
        context: of the member.
        device: where to train.
        evaluate: after every epoch; the same numbers on all ranks.
        metric: score that selects.
        loss: ``(module, piece) -> Losses``; the method's by default.

    Raises:
        SpecError: experts over ranks without DeepSpeed, or sizes that do not divide.
        EnvironmentProblem: DeepSpeed is asked for and not there.
    """
    phase = method.config.training
    per_epoch = images.steps_per_epoch
    epochs = phase.epochs if settings.epochs is None else settings.epochs
    if epochs == 0:
        network.to(device).eval()
        scores = {name: float(value) for name, value in evaluate(network, 0).items()}
        return Trained(0, network.state_dict(), [Evaluation(-1, scores, True)], phase.batch_size)
    # Another length stretches the schedule: the last epoch is always the end of the cosine.
    rates = phase.model_copy(update={"epochs": epochs, "warmup_epochs": min(phase.warmup_epochs, epochs)}).rates()
    engine = make_engine(method, network, settings, device)
    spec = LoopSpec(
        steps=epochs * per_epoch,
        seed=mix(context.seed, 4),
        schedules={"*": lambda step: rates[min(step // per_epoch, epochs - 1)] / phase.scaled_lr},
        checkpoint_every=settings.checkpoint_every,
        evaluate_after=every(per_epoch),
        metric=metric,
    )
    folder = CheckpointDir(context.scratch / "checkpoints", log=context.log)
    of = loss or (lambda module, piece: method.loss(module, piece))
    try:
        result = fit(engine, lambda step: _on(images(step), device), spec, context, folder, evaluate, of)
    finally:
        engine.destroy()
    state = result.selected if settings.select == "best" else result.last
    network.load_state_dict(state)
    network.eval()
    return Trained(result.steps, state, _kept(result, settings), phase.batch_size)


def make_engine(method: Method, network: nn.Module, settings: RunSettings, device: torch.device) -> Engine:
    """The engine that the settings name, with the optimiser of the phase.

    Raises:
        SpecError: experts over ranks without DeepSpeed, or sizes that do not divide.
        EnvironmentProblem: DeepSpeed is asked for and not there.
    """
    phase = method.config.training
    groups = [ParamGroup(g.name, g.parameters, g.lr, g.weight_decay) for g in method.param_groups(network)]
    precision = settings.precision or ("bf16" if phase.amp else "fp32")
    options = OptimizerOptions(phase.optimizer, phase.betas, phase.eps, phase.momentum, phase.clip, precision)
    if settings.engine == "torch":
        if settings.ep_size > 1:
            raise SpecError(
                f"ep_size is {settings.ep_size}, and the torch engine keeps all experts on every rank.",
                "Use engine: deepspeed, or ep_size: 1.",
            )
        return TorchEngine(network, groups, options, device)
    from workers.engines.deepspeed import DeepSpeedEngine, DeepSpeedOptions

    zero = DeepSpeedOptions(settings.zero_stage, settings.ep_size)
    return DeepSpeedEngine(network, groups, options, zero, device)


def evaluate_over_ranks(
    module: nn.Module, data: DomainData, rows: IntArray, reader: ImageReader, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Scores of ``rows`` together, each rank having run its share of them; the same numbers on every rank.

    Differs: in the public ViT trainer every rank runs all rows, but for the last incomplete batch, which is left out.
    """
    rank, world_size = ranks()
    if world_size == 1:
        return score_logits(data, rows, logits_of(module, rows, reader, batch_size, device))
    shares = np.array_split(rows, world_size)
    outputs = data.info.num_outputs
    own = shares[rank]
    logits = logits_of(module, own, reader, batch_size, device) if len(own) else np.zeros((0, outputs), np.float32)
    padded = torch.zeros(max(len(share) for share in shares), outputs, device=device)
    padded[: len(own)] = torch.from_numpy(logits).to(device)
    gathered = [torch.zeros_like(padded) for _ in shares]
    dist.all_gather(gathered, padded)
    parts = [part[: len(share)].cpu().numpy() for part, share in zip(gathered, shares, strict=True)]
    together: NDArray[np.float32] = np.concatenate(parts)
    return score_logits(data, rows, together)


def _kept(result: FitResult, settings: RunSettings) -> list[Evaluation]:
    """Evaluations up to the state that was kept."""
    if settings.select == "last" or result.best_step is None:
        return result.evaluations
    return [e for e in result.evaluations if e.step <= result.best_step]


def _on(pieces: Sequence[Weighted], device: torch.device) -> list[Weighted]:
    return [Weighted(tuple(None if x is None else x.to(device) for x in p.batch), p.weight) for p in pieces]
