"""Pre-training of the aggregator: a classifier over the tokens of all frozen experts (Meta-DMoE, section 3.3).

With cached features no expert runs at all, whatever the number of epochs; a random transform reads the variant that was
drawn from the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from workers.batches import chunks
from workers.checkpoints import CheckpointDir
from workers.context import Reporter
from workers.datasets.base import DomainData, IntArray
from workers.device import setup
from workers.engines.base import ParamGroup
from workers.engines.torch import TorchEngine
from workers.features import FeatureTable
from workers.loop import fit, mix
from workers.modelfile import AGGREGATOR_FILE
from workers.settings import TrainSettings
from workers.train_model import (
    TrainResult,
    finish,
    loop_spec,
    optimizer_options,
    row_sampler,
    score_logits,
    total_steps,
)

if TYPE_CHECKING:
    from moe.aggregator import Aggregator


def train_aggregator(
    settings: TrainSettings,
    data: DomainData,
    rows: IntArray,
    val_rows: IntArray,
    aggregator: Aggregator,
    table: FeatureTable,
    reporter: Reporter,
    scratch: Path,
    output: Path | None,
    *,
    seed: int = 0,
    threads: int = 1,
) -> TrainResult:
    """Train ``aggregator`` on cached tokens of all experts and write ``output/aggregator.safetensors``.

    Args:
        settings: as of the supervised stages; ``image_size`` and ``loader_threads`` have no meaning here.
        data: labels and metadata; its images are not read.
        rows: training rows.
        val_rows: rows of every evaluation, transform variant 0.
        aggregator: with its initial weights; trained in place.
        table: features of all experts for both kinds of rows.
        reporter: progress, and whether to stop.
        scratch: checkpoints.
        output: folder of the result; None writes nothing.
        seed: of shuffling, variants and dropout.
        threads: compute threads.

    Raises:
        DataError: the cache lacks a row.
        RunFailed: the loss is not finite.
    """
    device = setup(threads, settings.device).device
    sampler = row_sampler(settings, data, rows, mix(seed, 1))
    steps = total_steps(settings, sampler.steps_per_epoch)
    labels = torch.from_numpy(np.ascontiguousarray(data.labels))

    def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        chosen = sampler.batch(step)
        variants = None
        if table.variants > 1:
            variants = np.random.default_rng((mix(seed, 2), step)).integers(table.variants, size=len(chosen))
        return [(table.tokens(chosen, variants).to(device), labels[torch.from_numpy(chosen)].to(device))]

    group = ParamGroup("aggregator", list(aggregator.parameters()), settings.lr, settings.weight_decay)
    result = fit(
        TorchEngine(aggregator, [group], optimizer_options(settings), device),
        batches,
        loop_spec(settings, steps, sampler.steps_per_epoch, seed, data.info.selection_metric),
        reporter,
        CheckpointDir(scratch / "checkpoints", log=reporter.log),
        evaluate=lambda module, step: evaluate_aggregator(
            module, data, val_rows, table, settings.eval_batch_size, device
        ),
        loss_fn=aggregator_loss(data.info.task),
    )
    return finish(result, settings, aggregator, None if output is None else output / AGGREGATOR_FILE)


def aggregator_loss(task: str) -> Any:
    """``(aggregator, (tokens [B, E, D], labels)) -> Losses``: the task loss of its classification head."""
    from moe.losses import Losses, task_loss

    def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Losses:
        tokens, labels = batch
        return Losses(task_loss(task, module(tokens).logits_BK, labels), {})

    return loss


def evaluate_aggregator(
    module: nn.Module,
    data: DomainData,
    rows: IntArray,
    table: FeatureTable,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Scores of the aggregator used as a classifier over all experts' tokens."""
    with torch.inference_mode():
        parts = [module(table.tokens(piece).to(device)).logits_BK.float().cpu() for piece in chunks(rows, batch_size)]
    return score_logits(data, rows, torch.cat(parts).numpy())
