"""A full evaluation with adaptation: 2 domains of 3 batches.

Official-like: the data set is set up again for every domain, all experts run on the first batch, the inner gradient
keeps a second-order graph, and logits come batch by batch. Ours groups the rows once, reads cached features and adapts
to first order. The predictions are the same.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from benchmarks.aggregator import Quiet, _Images
from benchmarks.measure import Row, alternate
from benchmarks.setting import EXPERTS, SUPPORT, Setting, Sizes, make
from moe.inner import Graph, inner_step, uniform_rates
from workers.features import FeatureTable, write_features
from workers.transforms import Transform, TransformSpec

DOMAINS, BATCHES = 2, 3


def run(sizes: Sizes) -> list[Row]:
    """One row."""
    import tempfile
    from pathlib import Path

    setting = make(sizes)
    count = DOMAINS * BATCHES * SUPPORT
    shape = (count, sizes.pixels, sizes.pixels, 3)
    images = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    transform = Transform(TransformSpec(normalisation="imagenet"))
    domains = np.arange(count).reshape(DOMAINS, BATCHES, SUPPORT)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(index) for index in range(EXPERTS)]
        first = domains[:, 0].reshape(-1)
        for expert, path in zip(setting.experts, paths, strict=True):
            write_features(expert.extract, _Images(images), first, transform, path, SUPPORT, Quiet())
        table = FeatureTable(paths)

        def official() -> Tensor:
            outputs = []
            for domain in domains:
                own = copy.deepcopy(images)
                support = transform.batch(own[domain[0]])
                outputs.append(_adapt_and_predict(setting, domain, own, transform, setting.tokens(support), "full"))
            return torch.cat(outputs)

        def ours() -> Tensor:
            return torch.cat(
                [
                    _adapt_and_predict(setting, domain, images, transform, table.tokens(domain[0]), "none")
                    for domain in domains
                ]
            )

        gap = float((official() - ours()).abs().max())
        base, mine = alternate([official, ours], sizes.repetitions)
    what = f"evaluation, {sizes.backbone}, {sizes.pixels} px, {EXPERTS} experts, {DOMAINS} domains x {BATCHES} batches"
    return [Row(what, base, mine, 1.7, f"logits differ by {gap:.1e}")]


def _adapt_and_predict(
    setting: Setting, domain: np.ndarray, images: np.ndarray, transform: Transform, tokens: Tensor, graph: Graph
) -> Tensor:
    student = setting.student
    with torch.no_grad():
        target = setting.aggregator(tokens).feat_BD
    rates = uniform_rates(student, 1e-4)
    adapted = inner_step(student, transform.batch(images[domain[0]]), target, rates, graph=graph).adapted
    with torch.no_grad():
        return torch.cat([student.run(transform.batch(images[rows]), adapted).logits_BK for rows in domain])
