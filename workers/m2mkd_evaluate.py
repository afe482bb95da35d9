"""Scores of finished m2mKD models: splits in and out of domain, sets that share some classes, few-shot episodes.

A set of fewer classes (Tiny-ImageNet-R for a model of Tiny-ImageNet) is scored on the logits of its classes alone, by
name, as the circuits' trainer does; nothing is ever selected on it.

- Parity: ``parity: official`` keeps the noise of circuits in evaluation (the mean over ``draws`` is reported) and
  leaves the last incomplete batch of a ViT out.
- Differs: without it circuits are evaluated without noise, and every row counts. The ViT trainer does not restrict
  logits to the classes of a smaller set; here that is done for all models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe.algorithms.m2mkd import Config
from moe.errors import DataError
from workers.batches import ImageReader
from workers.context import Context, Input, run_seed
from workers.data import open_data, rows_of
from workers.datasets.base import DomainData, IntArray
from workers.device import setup
from workers.loop import mix
from workers.m2mkd_fewshot import few_shot
from workers.m2mkd_files import read_network
from workers.m2mkd_images import eval_reader
from workers.m2mkd_settings import FewShot
from workers.train_model import logits_of, score_logits

EVALUATION = "evaluation.json"


def evaluate_member(
    config: Config,
    splits: Sequence[str],
    shots: FewShot | None,
    batch_size: int,
    context: Context,
    draws: int = 1,
) -> dict[str, Any]:
    """Score every model that is wired and write ``evaluation.json``; ports ``data``, ``models`` and perhaps ``ood``.

    Args:
        config: the method.
        splits: of ``data``.
        shots: few-shot episodes, or None.
        batch_size: images per forward pass.
        context: of the member.
        draws: evaluations of a noisy model whose mean is reported (``parity: official``).

    Returns:
        The artifact's ``meta``: the selection metric by model and split; further sets go by their names.

    Raises:
        DataError: no models, two of the same label, or a set whose classes the model does not know.
    """
    device = setup(context.threads).device
    data = open_data(context.inputs["data"][0], context.data_root)
    others = {
        found.info.name: found for found in (open_data(a, context.data_root) for a in context.inputs.get("ood", ()))
    }
    models = context.inputs["models"]
    labels = [str(artifact.meta["label"]) for artifact in models]
    if not models or len(set(labels)) != len(labels):
        raise DataError(f"Models to score: {', '.join(labels) or 'none'}.", "Give every m2mkd_train stage a `label`.")
    parts: list[tuple[str, DomainData, str, IntArray | None]] = [(split, data, split, None) for split in splits]
    parts += [(name, other, "test", shared_classes(data, other)) for name, other in others.items()]
    records = []
    counts = {part: len(rows_of(own, (split,))) for part, own, split, _ in parts}
    for artifact in models:
        network = read_network(artifact, quiet=config.parity == "fixed").to(device)
        side, noisy = int(artifact.meta["image_size"]), artifact.meta["form"] == "circuit"
        official = config.parity == "official"
        scores = {}
        for part, own, split, columns in parts:
            rows = rows_of(own, (split,))
            if official and not noisy and len(rows) >= batch_size:
                rows = rows[: len(rows) // batch_size * batch_size]
                counts[part] = len(rows)
            reader, times = eval_reader(own, side, config.augment, 0), draws if noisy and official else 1
            scores[part] = _mean_scores(network, own, rows, reader, batch_size, device, columns, times, context.seed)
        record = {**_described(artifact, network), "scores": scores, "few_shot": None}
        if shots is not None:
            reader = eval_reader(data, side, config.augment, 0)
            record["few_shot"] = few_shot(network, data, reader, config, shots, run_seed(context.member), device)
        records.append(record)
        context.check()
    metric = data.info.selection_metric
    evaluation = {
        "seed": run_seed(context.member),
        "dataset": data.info.name,
        "title": data.info.title,
        "metric": metric,
        "splits": [part for part, *_ in parts],
        "rows": counts,
        "few_shot": None if shots is None else shots.model_dump(mode="json"),
        "miniature": any("_miniature" in one.value_names for one in (data, *others.values())),
        "models": records,
    }
    (context.output / EVALUATION).write_text(json.dumps(evaluation, indent=1, sort_keys=True))
    found = {r["label"]: {part: round(r["scores"][part][metric], 6) for part, *_ in parts} for r in records}
    for label, by_split in found.items():
        context.metrics({f"{label.replace(' ', '_')}/{split}": value for split, value in by_split.items()})
    return {"metric": metric, "scores": found}


def shared_classes(data: DomainData, other: DomainData) -> IntArray:
    """The column of ``data``'s logits for each class of ``other``, by the names of the classes.

    Raises:
        DataError: one of them has no names, or ``other`` has classes that ``data`` has not.
    """
    known, wanted = (tuple(one.value_names.get("y", ())) for one in (data, other))
    unknown = sorted(set(wanted) - set(known))
    if not wanted or unknown:
        what = f"the classes {', '.join(unknown[:3])}" if wanted else "no names of classes"
        raise DataError(
            f"{other.info.name} has {what}, which {data.info.name} does not know ({len(unknown)} of {len(wanted)}).",
            "Score it on models of a set with the same class names, such as tiny_imagenet_r on tiny_imagenet.",
        )
    place = {name: column for column, name in enumerate(known)}
    return np.array([place[name] for name in wanted], dtype=np.int64)


def _mean_scores(
    network: nn.Module,
    data: DomainData,
    rows: IntArray,
    reader: ImageReader,
    batch_size: int,
    device: torch.device,
    columns: IntArray | None,
    times: int,
    seed: int,
) -> dict[str, float]:
    """Scores over ``rows``, the mean over ``times`` evaluations, of all logits or those of some columns."""
    found: list[Mapping[str, float]] = []
    for number in range(times):
        torch.manual_seed(mix(seed, 7, number))
        logits: NDArray[np.float32] = logits_of(network, rows, reader, batch_size, device)
        found.append(score_logits(data, rows, logits if columns is None else logits[:, columns]))
    return {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}


def _described(artifact: Input, network: nn.Module) -> dict[str, Any]:
    meta = artifact.meta
    return {
        "label": meta["label"],
        "parameters": sum(p.numel() for p in network.parameters()),
        "images": meta["images"],
        "batch_size": meta.get("batch_size"),
        "history": meta["history"],
    }
