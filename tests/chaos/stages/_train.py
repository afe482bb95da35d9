"""The same training with torch, on several ranks: with the project's own loop, engine and checkpoints.

The first rank writes down every update that is really computed, so that work done twice is counted exactly.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.chaos.stages._count import note
from tests.chaos.stages._learn import CLASSES, HIDDEN, INPUTS, SIZES, TrainConfig
from workers.checkpoints import CheckpointDir
from workers.context import Reporter
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine
from workers.loop import LoopSpec, every, fit

_BATCH = 32
NAMES = ("net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias")


class _Loss(nn.Module):
    """A network of two layers; called with a batch it returns the cross-entropy."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Dropout(0.1), nn.Linear(HIDDEN, CLASSES))

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x_BI, y_B = batch
        return nn.functional.cross_entropy(self.net(x_BI), y_B)


def train(
    config: TrainConfig, name: str, seed: int, start: Path | None, scratch: Path, reporter: Reporter
) -> np.ndarray:
    """Train (from the weights in the file ``start``, if any) and return all weights as one vector."""
    teacher_IC = torch.randn(INPUTS, CLASSES, generator=torch.Generator().manual_seed(seed % 2**31))
    module = _Loss(seed % 2**31)
    if start is not None:
        _fill(module, np.load(start))
    options = OptimizerOptions(name="adam")
    engine = TorchEngine(module, [ParamGroup("all", list(module.parameters()), lr=1e-2)], options)

    def batches(step: int) -> list[Any]:
        if engine.rank == 0:
            note(f"{name}@{scratch.name[:8]}", step)
        time.sleep(config.pause_s)
        draw = torch.Generator().manual_seed((seed * 1_000_003 + step * 101 + engine.rank) % 2**31)
        x_BI = torch.randn(_BATCH, INPUTS, generator=draw)
        return [(x_BI, (x_BI @ teacher_IC).argmax(1))]

    def score(module: nn.Module, step: int) -> dict[str, float]:
        x_BI = torch.randn(256, INPUTS, generator=torch.Generator().manual_seed(seed % 2**31 + 1))
        hits = module.net(x_BI).argmax(1) == (x_BI @ teacher_IC).argmax(1)  # type: ignore[operator, union-attr]
        return {"accuracy": float(hits.float().mean())}

    spec = LoopSpec(
        config.steps, seed % 2**31, checkpoint_every=config.checkpoint_every, evaluate_after=every(config.steps // 2)
    )
    checkpoints = CheckpointDir(scratch / "checkpoints", log=reporter.log)
    last = fit(engine, batches, spec, reporter, checkpoints, evaluate=score).last
    layers = [last[name].double().numpy() for name in NAMES]
    return np.concatenate([(layer.T if layer.ndim == 2 else layer).ravel() for layer in layers])


def _fill(module: _Loss, weights: np.ndarray) -> None:
    """Put a vector of :mod:`tests.chaos.stages._learn` into the network."""
    w1, b1, w2, b2 = np.split(weights, np.cumsum(SIZES)[:-1])
    values = (w1.reshape(INPUTS, HIDDEN).T, b1, w2.reshape(HIDDEN, CLASSES).T, b2)
    module.load_state_dict({name: torch.tensor(value).float() for name, value in zip(NAMES, values, strict=True)})
