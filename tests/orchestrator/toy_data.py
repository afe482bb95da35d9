"""A stage whose artifact is of kind ``data``, for the tests of dataset inputs in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.stages.base import Member, StageBase, StageConfig
from workers.context import Context


class Stage(StageBase[StageConfig]):
    """Writes an index that says nothing."""

    output = "data"
    per_seed = False

    def run(self, config: StageConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write one file."""
        (context.output / "index.txt").write_text("rows")
        return {"dataset": "toy", "digest": "d" * 64}
