"""The same training on the ranks of a gang, which add up their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from orchestrator.stages.base import Member, Port, StageBase
from tests.chaos.stages._learn import TrainConfig
from workers.context import Context


class _Silent:
    """The reporter of the other ranks."""

    def progress(self, done: int, total: int, **values: float) -> None:
        """Nothing."""

    def log(self, message: str) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""


def job(config: dict[str, Any]) -> None:
    """The function of every rank."""
    import torch.distributed as dist

    from tests.chaos.stages._train import train

    scratch = Path(config["scratch"])
    weights = train(
        TrainConfig(**config["train"]),
        config["member"],
        config["seed"],
        scratch / "start.npy" if config["warm"] else None,
        scratch,
        config.get("reporter") or _Silent(),
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        np.save(scratch / "last.npy", weights)


class Stage(StageBase[TrainConfig]):
    """Trains on all ranks of a gang."""

    output = "weights"
    gang = True
    inputs: ClassVar[Mapping[str, Port]] = {"start": Port("weights", many=True, optional=True, doc="Weights to mean.")}
    Config = TrainConfig

    def run(self, config: TrainConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Train and write what rank 0 left."""
        arriving = [np.load(item.path / "weights.npy") for item in context.inputs.get("start", ())]
        if arriving:
            np.save(context.scratch / "start.npy", np.mean(arriving, axis=0))
        context.train(
            job,
            {
                "scratch": str(context.scratch),
                "member": context.member,
                "seed": context.seed,
                "train": config.model_dump(),
                "warm": bool(arriving),
            },
        )
        weights = np.load(context.scratch / "last.npy")
        np.save(context.output / "weights.npy", weights)
        return {"sum": float(weights.sum())}
