"""Runs a function through ``context.train``: rank 0 writes a number into scratch, the member moves it to its output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from tests.support.toy_stages._files import save, write_value
from workers.context import Context


class GangConfig(StageConfig):
    """What the ranks compute."""

    value: int = Field(1, description="The number.")
    die: bool = Field(False, description="The member's process dies once, when its ranks are there.")


def job(config: dict[str, Any]) -> None:
    """The function of every rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        config["reporter"].log(f"rank 0 is process {os.getpid()}")
        save(Path(config["path"]), {"value": config["value"] + 1})


class Stage(StageBase[GangConfig]):
    """A gang of ranks."""

    output = "number"
    gang = True
    inputs: ClassVar[Mapping[str, Port]] = {"start": Port("number", many=True, optional=True, doc="What it waits for.")}
    Config = GangConfig

    def run(self, config: GangConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Train, then read what rank 0 left."""
        path = context.scratch / "gang.json"
        context.train(job, {"path": str(path), "value": config.value})
        died = context.scratch / "died"
        if config.die and not died.exists():
            died.touch()
            os._exit(1)
        return write_value(context.output, int(json.loads(path.read_text())["value"]))
