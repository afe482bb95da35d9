"""One epoch's steps of aggregator pre-training: experts run on every batch, against their cached features on disk."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Row, alternate
from benchmarks.setting import CLASSES, EXPERTS, Sizes, make
from workers.aggregate import aggregator_loss
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine
from workers.features import FeatureTable, write_features
from workers.transforms import Transform, TransformSpec

BATCH, BATCHES = 24, 2


class _Images:
    """Images in memory, as data sets offer them."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> np.ndarray:
        image: np.ndarray = self.array[row]
        return image


class Quiet:
    """A reporter that says nothing."""

    def progress(self, done: int, total: int, **values: float) -> None:
        """Nothing."""

    def log(self, message: str) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""


def run(sizes: Sizes) -> list[Row]:
    """One row."""
    setting = make(sizes)
    rows = np.arange(BATCH * BATCHES)
    shape = (len(rows), sizes.pixels, sizes.pixels, 3)
    images = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, CLASSES, size=len(rows)))
    transform = Transform(TransformSpec(normalisation="imagenet"))
    loss = aggregator_loss("multiclass")
    engines = []
    for _ in range(2):
        aggregator = copy.deepcopy(setting.aggregator).train()
        group = ParamGroup("aggregator", list(aggregator.parameters()), 1e-6)
        engines.append(TorchEngine(aggregator, [group], OptimizerOptions()))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(index) for index in range(EXPERTS)]
        for expert, path in zip(setting.experts, paths, strict=True):
            write_features(expert.extract, _Images(images), rows, transform, path, BATCH, Quiet())
        table = FeatureTable(paths)

        def epoch(engine: TorchEngine, cached: bool) -> None:
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                tokens = table.tokens(batch) if cached else setting.tokens(transform.batch(images[batch]))
                engine.step([(tokens, labels[torch.from_numpy(batch)])], loss)

        base, ours = alternate([lambda: epoch(engines[0], False), lambda: epoch(engines[1], True)], sizes.repetitions)
    what = f"aggregator pre-training, {sizes.backbone}, {sizes.pixels} px, {EXPERTS} experts, batch {BATCH}"
    return [Row(f"{what}: cached epoch", base, ours, 5.0, f"{BATCHES} batches; features read from disk")]
