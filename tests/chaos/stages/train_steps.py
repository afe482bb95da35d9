"""A fan-out of small trainings, one process each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from orchestrator.stages.base import Member, Port, StageBase
from tests.chaos.stages._learn import TrainConfig, learn
from workers.context import Context


class Stage(StageBase[TrainConfig]):
    """Trains, from the mean of the weights that arrive if any do."""

    output = "weights"
    inputs: ClassVar[Mapping[str, Port]] = {"start": Port("weights", many=True, optional=True, doc="Weights to mean.")}
    Config = TrainConfig

    def members(self, config: TrainConfig) -> list[Member]:
        """Items 0 .. count-1; a single one has no name."""
        return [Member()] if config.count == 1 else [Member(f"item={i}") for i in range(config.count)]

    def run(self, config: TrainConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Train and write the weights."""
        arriving = [np.load(item.path / "weights.npy") for item in context.inputs.get("start", ())]
        start = np.mean(arriving, axis=0) if arriving else None
        weights = learn(config, context.member, context.seed, start, context.scratch, context)
        np.save(context.output / "weights.npy", weights)
        return {"sum": float(weights.sum())}
