"""Mirrors a fan-out: member ``item=i`` squares the number of the upstream member ``item=i``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from tests.support.toy_stages._files import read_values, write_value
from workers.context import Context


class SquareConfig(StageConfig):
    """The upstream fan-out, repeated here."""

    count: int = Field(1, ge=0, description="Members of the stage that is mirrored.")


class Stage(StageBase[SquareConfig]):
    """Squares numbers, one by one."""

    output = "number"
    inputs: ClassVar[Mapping[str, Port]] = {"number": Port("number", doc="The number to square.")}
    Config = SquareConfig

    def members(self, config: SquareConfig) -> list[Member]:
        """Items 0 .. count-1; a single one has no name."""
        return [Member()] if config.count == 1 else [Member(f"item={i}") for i in range(config.count)]

    def run(self, config: SquareConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the square."""
        (value,) = read_values(context.inputs["number"])
        return write_value(context.output, value * value)
