"""Adds everything that arrives at the port ``numbers`` plus, when connected, one ``extra``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from tests.support.toy_stages._files import read_values, write_value
from workers.context import Context


class SumConfig(StageConfig):
    """How to add."""

    factor: int = Field(1, ge=-1000, le=1000, description="The sum is multiplied by this.")
    rate: float = Field(1e-3, gt=0, le=1, description="Unused number, for tests of overrides.")


class Stage(StageBase[SumConfig]):
    """Adds numbers."""

    output = "number"
    inputs: ClassVar[Mapping[str, Port]] = {
        "numbers": Port("number", many=True, doc="What to add."),
        "extra": Port("number", optional=True, doc="One more number."),
    }
    Config = SumConfig

    def run(self, config: SumConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``factor * (sum(numbers) + extra)``."""
        total = sum(read_values(context.inputs["numbers"])) + sum(read_values(context.inputs.get("extra", ())))
        return write_value(context.output, config.factor * total)
