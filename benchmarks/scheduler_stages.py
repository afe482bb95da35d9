"""Stages of the scheduler benchmark: a fan-out of experts, and what takes them all. Their work is simulated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class FanConfig(StageConfig):
    """How many."""

    count: int = Field(1000, ge=1, description="Members.")


class Stage(StageBase[FanConfig]):
    """``count`` members, each after all inputs."""

    output = "number"
    inputs: ClassVar[Mapping[str, Port]] = {"before": Port("number", many=True, optional=True, doc="What comes first.")}
    Config = FanConfig

    def members(self, config: FanConfig) -> list[Member]:
        """expert=0 .. expert=count-1; a single one has no name."""
        return [Member()] if config.count == 1 else [Member(f"expert={i}", {"expert": i}) for i in range(config.count)]

    def run(self, config: FanConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Nothing: the simulated executor answers for it."""
        return {}
