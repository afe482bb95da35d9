"""Scores of finished m2mKD models on any splits, and few-shot episodes in which only a fresh head is trained.

Few-shot: k-way n-shot, the classifier alone is trained on frozen features (m2mKD, arXiv 2402.16918, section 5, phase
``fs`` of the public code). Differs: features are computed once instead of in every epoch, and stochastic depth is off
while the head trains. A circuit is evaluated without noise unless ``parity: official``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe.algorithms.m2mkd import Config, Phase
from moe.errors import DataError, SpecError
from workers.batches import ImageReader
from workers.context import Context, Input, run_seed
from workers.data import open_data, rows_of
from workers.datasets.base import DomainData
from workers.device import setup
from workers.few_shot import Episode, fewshot_split
from workers.loop import mix
from workers.m2mkd_files import read_network
from workers.m2mkd_images import eval_reader
from workers.m2mkd_settings import FewShot
from workers.train_model import evaluate_rows, logits_of

EVALUATION = "evaluation.json"


def evaluate_member(
    config: Config, splits: Sequence[str], few_shot: FewShot | None, batch_size: int, context: Context
) -> dict[str, Any]:
    """Score every model that is wired and write ``evaluation.json``; ports ``data`` and ``models``.

    Returns:
        The artifact's ``meta``: the selection metric by model and split.

    Raises:
        DataError: no models, models of other data, or two of the same label.
        SpecError: few-shot episodes of a circuit.
    """
    device = setup(context.threads).device
    data = open_data(context.inputs["data"][0], context.data_root)
    models = context.inputs["models"]
    labels = [str(artifact.meta["label"]) for artifact in models]
    if not models or len(set(labels)) != len(labels):
        raise DataError(f"Models to score: {', '.join(labels) or 'none'}.", "Give every m2mkd_train stage a `label`.")
    records = []
    for artifact in models:
        torch.manual_seed(mix(context.seed, 7))
        network = read_network(artifact, quiet=config.parity == "fixed").to(device)
        reader = eval_reader(data, int(artifact.meta["image_size"]), config.augment, 0)
        scores = {
            split: evaluate_rows(network, data, rows_of(data, (split,)), reader, batch_size, device) for split in splits
        }
        record = {**_described(artifact, network), "scores": scores, "few_shot": None}
        if few_shot is not None:
            record["few_shot"] = _few_shot(network, data, reader, config, few_shot, run_seed(context.member), device)
        records.append(record)
        context.check()
    metric = data.info.selection_metric
    evaluation = {
        "seed": run_seed(context.member),
        "dataset": data.info.name,
        "title": data.info.title,
        "metric": metric,
        "splits": list(splits),
        "rows": {split: len(rows_of(data, (split,))) for split in splits},
        "few_shot": None if few_shot is None else few_shot.model_dump(mode="json"),
        "miniature": "_miniature" in data.value_names,
        "models": records,
    }
    (context.output / EVALUATION).write_text(json.dumps(evaluation, indent=1, sort_keys=True))
    found = {r["label"]: {split: round(r["scores"][split][metric], 6) for split in splits} for r in records}
    for label, by_split in found.items():
        context.metrics({f"{label.replace(' ', '_')}/{split}": value for split, value in by_split.items()})
    return {"metric": metric, "scores": found}


def _described(artifact: Input, network: nn.Module) -> dict[str, Any]:
    meta = artifact.meta
    return {
        "label": meta["label"],
        "parameters": sum(p.numel() for p in network.parameters()),
        "images": meta["images"],
        "batch_size": meta.get("batch_size"),
        "history": meta["history"],
    }


def _few_shot(
    network: nn.Module,
    data: DomainData,
    reader: ImageReader,
    config: Config,
    settings: FewShot,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy of every episode, their mean and half the width of a 95 % interval (normal approximation)."""
    if not hasattr(network, "head"):
        raise SpecError("Few-shot episodes need a model with a linear head, this is a circuit.", "Leave few_shot out.")
    rows = rows_of(data, (settings.split,))
    head, network.head = network.head, nn.Identity()
    features = torch.from_numpy(logits_of(network, rows, reader, 128, device))
    network.head = head
    targets: NDArray[Any] = np.asarray(data.labels)[rows]
    found = []
    for number in range(settings.episodes):
        episode = fewshot_split(
            targets,
            settings.k_way,
            settings.n_shot,
            settings.queries,
            mix(seed, number) % 2**32,
            settings.protocol,
            data.info.num_outputs,
        )
        found.append(_episode(features, episode, settings, config, mix(seed, number, 1)))
    spread = 1.96 * float(np.std(found, ddof=1)) / len(found) ** 0.5
    return {"accuracies": found, "mean": float(np.mean(found)), "interval": spread}


def _episode(features: Tensor, episode: Episode, settings: FewShot, config: Config, seed: int) -> float:
    """Train a fresh linear head on the episode's images and score it on its queries."""
    size = settings.k_way * settings.n_shot
    # The V-MoE recipe where the method has none of its own.
    phase = config.fs or Phase(batch_size=size, epochs=100, warmup_epochs=20, lr=2e-3, lr_batch=None, amp=False)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(features.shape[1], settings.k_way)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": phase.weight_decay}, {"params": [head.bias], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.scaled_lr, betas=phase.betas, eps=phase.eps)
    x, y = features[episode.train_index], torch.from_numpy(episode.train_label)
    for rate in phase.rates():
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y, label_smoothing=config.augment.smoothing).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        predicted = head(features[episode.val_index]).argmax(1).numpy()
    return float((predicted == episode.val_label).mean())
