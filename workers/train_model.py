"""Supervised training of one network on some rows: experts, baselines and the student's pre-training.

Meta-DMoE (arXiv 2210.03885), sections 3.2 and 3.4 of its procedure: uniform shuffling, task loss, Adam, BatchNorm in
training mode, selection on the whole out-of-domain validation split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe.algorithms.base import Algorithm
from workers.batches import DomainSampler, ImageReader, Prefetcher, chunks
from workers.checkpoints import CheckpointDir
from workers.context import Reporter
from workers.datasets.base import DomainData, IntArray
from workers.device import setup
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine
from workers.loop import OBSERVED, FitResult, LoopSpec, Schedule, epoch_halves, every, fit, mix, official_halves
from workers.metrics import score
from workers.modelfile import MODEL_FILE, save_tensors
from workers.networks import groups_of
from workers.sampling import EpochSampler, group_index
from workers.schedules import constant, cosine_warmup, exponential_per_epoch, one_cycle
from workers.segments import STATE, Segment
from workers.settings import TrainSettings
from workers.transforms import Transform

__all__ = ["TrainResult", "TrainSettings", "train_model"]


@dataclass(frozen=True)
class TrainResult:
    """A trained network.

    Attributes:
        fit: evaluations and states.
        scores: validation scores of the written state.
        step: update after which it was taken (0-based).
    """

    fit: FitResult
    scores: Mapping[str, float]
    step: int


def train_model(
    settings: TrainSettings,
    data: DomainData,
    rows: IntArray,
    val_rows: IntArray,
    init: nn.Module,
    reporter: Reporter,
    scratch: Path,
    output: Path | None,
    *,
    seed: int = 0,
    threads: int = 1,
    transforms: tuple[Transform, Transform],
    algorithm: Algorithm[Any] | None = None,
    segment: Segment | None = None,
) -> TrainResult:
    """Train ``init`` on ``rows`` and write the selected state to ``output/model.safetensors``.

    Args:
        settings: see :class:`TrainSettings`.
        data: the data set.
        rows: training rows.
        val_rows: rows of every evaluation.
        init: a network ``images [B, C, H, W] -> logits [B, K]`` with its initial weights; trained in place.
        reporter: progress, and whether to stop.
        scratch: checkpoints live here; an interrupted call continues from them, bit-equal.
        output: folder of the result; None writes nothing.
        seed: of shuffling, augmentation and dropout.
        threads: compute threads.
        transforms: (training, evaluation).
        algorithm: makes losses, updates and averages, and gets its batches domain by domain; plain ERM without.
        segment: train a part only; if more is to come, the last state is written, with ``state/`` beside it.

    Raises:
        RunFailed: the loss is not finite.
        Interrupted: a stop was asked for; the last checkpoint is kept.
    """
    device = setup(threads, settings.device).device
    train_transform, eval_transform = transforms
    reader = ImageReader(data.images, train_transform, settings.loader_threads)
    same = eval_transform.identity == train_transform.identity
    eval_reader = reader if same else ImageReader(data.images, eval_transform, settings.loader_threads)
    sampler = row_sampler(settings, data, rows, mix(seed, 1))
    steps = total_steps(settings, sampler.steps_per_epoch)
    labels = torch.from_numpy(np.ascontiguousarray(data.labels))

    def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        chosen = sampler.batch(step)
        variants = reader.draw(len(chosen), np.random.default_rng((mix(seed, 2), step)))
        images, targets = reader.read(chosen, variants), labels[torch.from_numpy(chosen)]
        if algorithm is not None:
            return list(by_domain(images, targets, data.column(data.info.domain_field, chosen)))
        size = settings.micro_batch or len(chosen)
        return list(zip(torch.split(images, size), torch.split(targets, size), strict=True))

    groups = _groups(init, settings) if algorithm is None else groups_of(algorithm, init)
    average = None if algorithm is None else algorithm.averaging()
    observes = average is not None and average.observes
    engine = TorchEngine(init, groups, optimizer_options(settings), device)
    prefetch = Prefetcher(batches, steps, depth=2 if settings.loader_threads else 0)
    loop = loop_spec(settings, steps, sampler.steps_per_epoch, seed, data.info.selection_metric)
    checkpoints = CheckpointDir(scratch / "checkpoints", log=reporter.log)
    if segment is not None:
        loop = replace(loop, pause=segment.until)
        if segment.start is not None:
            checkpoints.adopt(segment.start)
    try:
        result = fit(
            engine,
            lambda step: _placed(prefetch(step), device, weighted=algorithm is None),
            loop,
            reporter,
            checkpoints,
            evaluate=lambda module, step: evaluate_rows(
                module, data, val_rows, eval_reader, settings.eval_batch_size, device, with_loss=observes
            ),
            loss_fn=supervised_loss(data.info.task) if algorithm is None else None,
            algorithm=algorithm,
        )
    finally:
        prefetch.close()
        reader.close()
        eval_reader.close()
    if result.left and output is not None:
        checkpoints.export(output / STATE)
    return finish(result, settings, init, None if output is None else output / MODEL_FILE)


def supervised_loss(task: str) -> Any:
    """``(module, (images, labels)) -> Losses``: the task loss, plus the balance loss of an MoE block if it has one."""
    from moe.backbones import Student
    from moe.losses import Losses, task_loss
    from moe.meta_step import balance_weight

    def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Losses:
        images, labels = batch
        if not isinstance(module, Student) or module.moe is None:
            return Losses(task_loss(task, module(images), labels), {})
        out = module.run(images)
        value, balance = task_loss(task, out.logits_BK, labels), cast(torch.Tensor, out.balance)
        return Losses(value + balance_weight(module) * balance, {"task": value, "balance": balance})

    return loss


def row_sampler(settings: TrainSettings, data: DomainData, rows: IntArray, seed: int) -> EpochSampler | DomainSampler:
    """Who is in which batch: shuffled epochs, or every domain equally often."""
    if settings.sampling == "rows":
        return EpochSampler(rows, settings.batch_size, seed, settings.drop_last)
    domains = data.column(data.info.domain_field, rows)
    return DomainSampler(rows, domains, settings.batch_size, seed, balanced=settings.sampling == "balanced")


def total_steps(settings: TrainSettings, per_epoch: int) -> int:
    """Updates of a stage whose epochs have ``per_epoch`` batches: epochs, bounded by ``steps`` when both are given."""
    by_epochs = settings.epochs * per_epoch if settings.epochs is not None else settings.steps
    return min(limit for limit in (by_epochs, settings.steps) if limit is not None)


def loop_spec(settings: TrainSettings, steps: int, per_epoch: int, seed: int, metric: str) -> LoopSpec:
    """The loop of a supervised stage of ``steps`` updates, ``per_epoch`` of them in each epoch."""
    schedules: dict[str, Schedule] = {
        "exponential": exponential_per_epoch(settings.decay, per_epoch),
        "cosine": cosine_warmup(settings.warmup_epochs * per_epoch, steps),
        "constant": constant(),
        "onecycle": one_cycle(steps),
    }
    after = {
        "official": official_halves(per_epoch),
        "halves": epoch_halves(per_epoch),
        "epoch": every(per_epoch),
        "steps": every(settings.evaluate_every),
    }
    return LoopSpec(
        steps=steps,
        seed=mix(seed, 3),
        schedules={"*": schedules[settings.schedule]},
        ema_decay=settings.ema_decay,
        checkpoint_every=settings.checkpoint_every,
        evaluate_after=after[settings.cadence],
        metric=metric,
        best_from=0.0 if settings.parity == "official" else float("-inf"),
        patience=settings.patience,
    )


def logits_of(
    module: nn.Module, rows: IntArray, reader: ImageReader, batch_size: int, device: torch.device
) -> NDArray[np.float32]:
    """Outputs of ``module`` for ``rows``, float32 ``[N, K]``; the caller sets the module's mode."""
    parts = []
    with torch.inference_mode():
        for piece in chunks(rows, batch_size):
            parts.append(module(reader.read(piece).to(device)).float().cpu().numpy())
    return np.concatenate(parts)


def evaluate_rows(
    module: nn.Module,
    data: DomainData,
    rows: IntArray,
    reader: ImageReader,
    batch_size: int,
    device: torch.device,
    with_loss: bool = False,
) -> dict[str, float]:
    """Scores of ``data.info.metrics`` over ``rows`` together (not a mean over batches); their mean loss if asked."""
    from moe.losses import task_loss

    logits = logits_of(module, rows, reader, batch_size, device)
    scores = score_logits(data, rows, logits)
    if with_loss:
        labels = torch.from_numpy(np.ascontiguousarray(data.labels[rows]))
        scores[OBSERVED] = float(task_loss(data.info.task, torch.from_numpy(logits), labels))
    return scores


def score_logits(data: DomainData, rows: IntArray, logits: NDArray[np.float32]) -> dict[str, float]:
    """Scores of outputs ``[N, K]`` for ``rows`` of ``data``."""
    from moe.losses import predict

    groups, _ = group_index(data.metadata, data.fields, data.info.group_fields)
    predictions = predict(data.info.task, torch.from_numpy(logits)).numpy()
    return score(
        data.info, predictions, data.labels[rows], data.metadata[rows], data.fields, data.value_names, groups[rows]
    )


def _groups(module: nn.Module, settings: TrainSettings) -> list[ParamGroup]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if settings.head_lr is None or settings.head_lr == settings.lr:
        return [ParamGroup("model", parameters, settings.lr, settings.weight_decay)]
    head = [p for layer in list(module.modules())[-1:] for p in layer.parameters()]
    known = {id(p) for p in head}
    body = [p for p in parameters if id(p) not in known]
    return [
        ParamGroup("body", body, settings.lr, settings.weight_decay),
        ParamGroup("head", head, settings.head_lr, settings.weight_decay),
    ]


def optimizer_options(settings: TrainSettings) -> OptimizerOptions:
    """The optimiser that the settings name."""
    return OptimizerOptions(settings.optimizer, momentum=0.9, clip=settings.clip, precision=settings.precision)


def by_domain(images: torch.Tensor, labels: torch.Tensor, domains: IntArray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images ``[B, C, H, W]`` and labels ``[B]`` as one pair per domain, in ascending order of the domains' numbers."""
    masks = [torch.from_numpy(domains == domain) for domain in np.unique(domains)]
    return [(images[mask], labels[mask]) for mask in masks]


def _placed(pieces: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device, weighted: bool) -> list[Any]:
    """Pieces on the device; micro-batches are weighted by their size."""
    from workers.engines.base import Weighted

    moved = [(x.to(device), y.to(device)) for x, y in pieces]
    total = sum(len(y) for _, y in moved)
    return [Weighted((x, y), len(y) / total) for x, y in moved] if weighted else moved


def finish(result: FitResult, settings: TrainSettings, module: nn.Module, path: Path | None) -> TrainResult:
    """Put the chosen state into ``module`` (left in evaluation mode), write it to ``path``, say where it came from.

    Of a run that is to go on it is the last state.
    """
    select = "last" if result.left else settings.select
    chosen = result.selected if select == "best" else result.last
    step = result.steps - 1
    if select == "best" and result.best_step is not None:
        step = result.best_step
    at_step = [e.scores for e in result.evaluations if e.step == step]
    module.load_state_dict(chosen)
    module.eval()
    if path is not None:
        save_tensors(path, chosen)
    return TrainResult(result, result.paused or (at_step[-1] if at_step else {}), step)
