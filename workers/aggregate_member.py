"""The member of the ``aggregate`` stage: build the aggregator, pre-train it on cached features, describe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from moe.aggregator import Aggregator
from moe.algorithms.meta_dmoe import AggregatorSpec
from moe.errors import SpecError
from workers.aggregate import train_aggregator
from workers.context import Context, Input
from workers.data import rows_of
from workers.datasets.base import DomainData
from workers.features import FeatureTable
from workers.loop import mix
from workers.modelfile import load_student
from workers.settings import TrainSettings


def train_aggregator_member(
    data: DomainData,
    features: Sequence[Input],
    spec: AggregatorSpec,
    settings: TrainSettings,
    context: Context,
    *,
    splits: Sequence[str],
    val_split: str,
    head_of: Input | None,
) -> dict[str, Any]:
    """Pre-train an aggregator and write ``aggregator.safetensors`` into ``context.output``.

    Args:
        data: labels and metadata.
        features: one artifact per expert, in expert order.
        spec: depth, heads, width, pooling.
        settings: how to train.
        context: of the member.
        splits: whose rows are trained on.
        val_split: whose rows select the state.
        head_of: a network whose frozen linear head replaces the aggregator's own, so that the teacher's features live
            in the space that this network classifies in. Differs: the official aggregator always has a head of its
            own, which ties its features to nothing that the student knows.

    Returns:
        The artifact's ``meta``; ``meta["aggregator"]`` holds the constructor arguments.

    Raises:
        SpecError: experts of different widths, or heads that do not divide the width.
    """
    table = FeatureTable([artifact.path for artifact in features])
    torch.manual_seed(mix(context.seed, 12))
    arguments = {"dim": table.dim, "num_outputs": data.info.num_outputs, **spec.model_dump()}
    aggregator = Aggregator(**arguments, plain_head=head_of is not None)
    if head_of is not None:
        _take_head(aggregator, head_of)
    result = train_aggregator(
        settings,
        data,
        rows_of(data, tuple(splits)),
        rows_of(data, (val_split,)),
        aggregator,
        table,
        context,
        context.scratch,
        context.output,
        seed=context.seed,
        threads=context.threads,
    )
    context.metrics({f"val/{name}": value for name, value in result.scores.items()}, step=result.step)
    return {
        "aggregator": {**arguments, "plain_head": head_of is not None},
        "experts": [artifact.member for artifact in features],
        "dataset": data.info.name,
        "steps": result.fit.steps,
        "selected_step": result.step,
        "scores": {name: round(float(value), 6) for name, value in result.scores.items()},
    }


def _take_head(aggregator: Aggregator, model: Input) -> None:
    """Copy the linear head of ``model`` into the aggregator and freeze it."""
    theirs = load_student(model.path, model.meta).classifier
    own = cast("nn.Linear", aggregator.mlp[-1])
    found = [parameter for parameter in theirs.parameters() if parameter.dim() == 2]
    if len(found) != 1 or found[0].shape != own.weight.shape:
        raise SpecError(
            f"The student's head has weights {[tuple(p.shape) for p in found]}, the aggregator needs one of "
            f"{tuple(own.weight.shape)}.",
            "Leave the input `student` out, so that the aggregator has a head of its own.",
        )
    with torch.no_grad():
        for mine, other in zip(own.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other)
    aggregator.mlp.requires_grad_(False)
