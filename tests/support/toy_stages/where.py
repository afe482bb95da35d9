"""Says on which node of a Ray it runs, and which GPUs it sees, in its log."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from orchestrator.stages.base import Member, StageBase, StageConfig
from tests.support.toy_stages._files import write_value
from workers.context import Context


class WhereConfig(StageConfig):
    """How many members, and how long each takes."""

    count: int = Field(1, ge=1, description="Members.")
    seconds: float = Field(0.0, ge=0, description="Time that a member takes.")


class Stage(StageBase[WhereConfig]):
    """Logs its place."""

    output = "number"
    Config = WhereConfig

    def members(self, config: WhereConfig) -> list[Member]:
        """item=0 .. item=count-1."""
        return [Member(f"item={i}", {"item": i}) for i in range(config.count)]

    def run(self, config: WhereConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """One line in the log."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        context.log(f"node={node} gpus={os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
        time.sleep(config.seconds)
        return write_value(context.output, int(member.params["item"]))
