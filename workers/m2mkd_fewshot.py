"""Few-shot episodes of finished m2mKD models: k-way n-shot, in which the classifier alone is trained.

m2mKD (arXiv 2402.16918), section 5, phase ``fs`` of the public code. A ViT or V-MoE gets a fresh linear head on its
frozen features; a circuit keeps the weights of its pooling's scores and gets fresh logits, both trained on its frozen
output states, with Gumbel noise while it trains.

Differs: features are computed once instead of in every epoch, and stochastic depth is off while the head trains.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe.algorithms.m2mkd import Config, Phase
from moe.errors import SpecError
from moe.models.nac.circuit import Circuit
from moe.models.nac.pooling import OutputLatentPooling
from workers.batches import ImageReader, chunks
from workers.data import rows_of
from workers.datasets.base import DomainData
from workers.engines.base import OptimizerOptions, ParamGroup, build_optimizer
from workers.few_shot import Episode, fewshot_split
from workers.loop import mix
from workers.m2mkd_settings import FewShot
from workers.train_model import logits_of


def few_shot(
    network: nn.Module,
    data: DomainData,
    reader: ImageReader,
    config: Config,
    settings: FewShot,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy of every episode, their mean and half the width of a 95 % interval (normal approximation).

    Args:
        network: in evaluation mode.
        data: the data set; ``settings.split`` is dealt out.
        reader: its images.
        config: the method; ``fs`` is the recipe, the published one of the network's family without it.
        settings: of the episodes.
        seed: the only source of randomness; the same episodes for every network.
        device: of the network.

    Raises:
        SpecError: the network has no classifier of its own.
        DataError: too few images for an episode.
    """
    rows = rows_of(data, (settings.split,))
    features, classifier = _frozen(network, rows, reader, device)
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
        own = _fresh(classifier, settings.k_way, mix(seed, number, 1))
        found.append(_episode(own, features, episode, settings, config, mix(seed, number, 2)))
    spread = 1.96 * float(np.std(found, ddof=1)) / len(found) ** 0.5
    return {"accuracies": found, "mean": float(np.mean(found)), "interval": spread}


def _frozen(
    network: nn.Module, rows: NDArray[Any], reader: ImageReader, device: torch.device
) -> tuple[Tensor, nn.Linear | OutputLatentPooling]:
    """What the classifier reads for ``rows`` (``[N, D]``, or a circuit's output states ``[N, U, S]``), and itself."""
    if isinstance(network, Circuit):
        if not isinstance(network.output_tokenizer, OutputLatentPooling):
            raise SpecError("This circuit's logits are its first output state; there is no classifier to train.")
        parts = []
        with torch.inference_mode():
            for piece in chunks(rows, 128):
                record = network.forward_with_record(reader.read(piece).to(device))
                parts.append(record.output_states.float().cpu())
        return torch.cat(parts).clone(), network.output_tokenizer
    head = getattr(network, "head", None)
    if not isinstance(head, nn.Linear):
        raise SpecError("Few-shot episodes need a model with a linear head.", "Leave few_shot out.")
    network.head = nn.Identity()
    features = torch.from_numpy(logits_of(network, rows, reader, 128, device))
    network.head = head
    return features, head


def _fresh(classifier: nn.Linear | OutputLatentPooling, classes: int, seed: int) -> nn.Module:
    """The classifier with new logits for the episode's classes."""
    old = classifier if isinstance(classifier, nn.Linear) else classifier.to_logits
    head = nn.Linear(old.in_features, classes)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    if isinstance(classifier, nn.Linear):
        return head
    own = copy.deepcopy(classifier).cpu()
    own.to_logits = head
    return own


def _recipe(own: nn.Module, config: Config, size: int) -> Phase:
    """``config.fs``, or the published recipe of the network's family."""
    if config.fs is not None:
        return config.fs
    if isinstance(own, nn.Linear):
        return Phase(batch_size=size, epochs=100, warmup_epochs=20, lr=2e-3, lr_batch=None, amp=False)
    return Phase(
        batch_size=size, epochs=500, optimizer="sgd", lr=3e-4, lr_batch=None, weight_decay=0.0, schedule="constant"
    )


def _episode(own: nn.Module, features: Tensor, episode: Episode, settings: FewShot, config: Config, seed: int) -> float:
    """Train the classifier on the episode's images and score it on its queries."""
    phase = _recipe(own, config, settings.k_way * settings.n_shot)
    matrices = [p for p in own.parameters() if p.ndim > 1 or phase.decay == "all"]
    vectors = [p for p in own.parameters() if not any(p is one for one in matrices)]
    groups = [
        ParamGroup("matrices", matrices, phase.scaled_lr, phase.weight_decay),
        ParamGroup("vectors", vectors, phase.scaled_lr, 0.0),
    ]
    options = OptimizerOptions(phase.optimizer, phase.betas, phase.eps, phase.momentum)
    optimizer = build_optimizer(groups, options)
    x, y = features[episode.train_index], torch.from_numpy(episode.train_label)
    own.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for rate in phase.rates():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(own(x), y, label_smoothing=config.augment.smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            predicted = cast("Tensor", own.eval()(features[episode.val_index])).argmax(1).numpy()
    return float((predicted == episode.val_label).mean())
