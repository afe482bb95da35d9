"""One member over all seeds: writes the list of what arrives and its sum; the end of a toy pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from tests.support.toy_stages._files import read_values, write_value
from workers.context import Context


class Stage(StageBase[StageConfig]):
    """Collects the numbers of every seed."""

    output = "report"
    inputs: ClassVar[Mapping[str, Port]] = {"numbers": Port("number", many=True, doc="Numbers of all seeds.")}
    per_seed = False

    def run(self, config: StageConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``table.json`` (member name -> number) and the sum."""
        inputs = context.inputs["numbers"]
        values = read_values(inputs)
        table = dict(zip([item.member for item in inputs], values, strict=True))
        (context.output / "table.json").write_text(json.dumps(table))
        return {**write_value(context.output, sum(values)), "members": list(table)}
