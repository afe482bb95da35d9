"""A fan-out of resumable loops, one process each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from orchestrator.stages.base import Member, Port, StageBase
from tests.chaos.stages._count import StepsConfig, count
from workers.context import Context


class Stage(StageBase[StepsConfig]):
    """Counts, starting from its seed and what arrives."""

    output = "number"
    inputs: ClassVar[Mapping[str, Port]] = {
        "start": Port("number", many=True, optional=True, doc="Numbers added to the initial state.")
    }
    Config = StepsConfig

    def members(self, config: StepsConfig) -> list[Member]:
        """Items 0 .. count-1; a single one has no name."""
        return [Member()] if config.count == 1 else [Member(f"item={i}") for i in range(config.count)]

    def run(self, config: StepsConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Count and write the result."""
        arriving = [
            json.loads((item.path / "value.json").read_text())["value"] for item in context.inputs.get("start", ())
        ]
        value = count(config, context.member, context.seed + sum(arriving), context.scratch, context)
        (context.output / "value.json").write_text(json.dumps({"value": value}))
        return {"value": value}
