"""The same loop on the first rank of a gang; the other ranks wait for its checkpoints' folder to say it is done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.stages.base import Member, Port, StageBase
from tests.chaos.stages._count import StepsConfig, count
from workers.context import Context


def job(config: dict[str, Any]) -> None:
    """The function of every rank."""
    scratch = Path(config["scratch"])
    done = scratch / "done.json"
    if int(os.environ.get("RANK", "0")) == 0:
        value = count(StepsConfig(**config["steps"]), config["member"], config["start"], scratch, config["reporter"])
        aside = done.with_suffix(".part")
        aside.write_text(json.dumps({"value": value}))
        os.replace(aside, done)
    while not done.exists():
        time.sleep(0.05)


class Stage(StageBase[StepsConfig]):
    """Counts on the ranks of a gang."""

    output = "number"
    gang = True
    inputs: ClassVar[Mapping[str, Port]] = {
        "start": Port("number", many=True, optional=True, doc="Numbers added to the initial state.")
    }
    Config = StepsConfig

    def run(self, config: StepsConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Train and write what rank 0 left."""
        arriving = [
            json.loads((item.path / "value.json").read_text())["value"] for item in context.inputs.get("start", ())
        ]
        context.train(
            job,
            {
                "scratch": str(context.scratch),
                "member": context.member,
                "start": context.seed + sum(arriving),
                "steps": config.model_dump(),
            },
        )
        value = json.loads((context.scratch / "done.json").read_text())["value"]
        (context.output / "value.json").write_text(json.dumps({"value": value}))
        return {"value": value}
