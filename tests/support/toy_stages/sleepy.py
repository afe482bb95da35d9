"""A resumable loop: the result depends on every step, so a resume that loses or repeats one is seen in the digest."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from tests.support.toy_stages._files import Crash, crash, read_values, save, write_value
from workers.context import Context

_PRIME = 2**61 - 1


class SleepyConfig(StageConfig):
    """Length of the loop, and where it crashes once."""

    steps: int = Field(20, ge=1, description="Steps of the loop.")
    step_s: float = Field(0.0, ge=0, description="Seconds of a step.")
    hurry: str = Field("", description="A file; from when on it is there, steps take no time.")
    checkpoint_every: int = Field(5, ge=1, description="Steps between checkpoints.")
    count: int = Field(1, ge=1, description="Members of the fan-out.")
    crash_at: int | None = Field(None, description="Step before which the first attempt crashes.")
    crash_how: Crash = Field("error", description="How it crashes.")


class Stage(StageBase[SleepyConfig]):
    """Steps slowly."""

    output = "number"
    inputs: ClassVar[Mapping[str, Port]] = {
        "start": Port("number", many=True, optional=True, doc="Numbers added to the initial state.")
    }
    Config = SleepyConfig

    def members(self, config: SleepyConfig) -> list[Member]:
        """Items 0 .. count-1; a single one has no name."""
        return [Member()] if config.count == 1 else [Member(f"item={i}") for i in range(config.count)]

    def run(self, config: SleepyConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Run the steps that are left, with a checkpoint, a progress call and a stop check now and then."""
        path = context.scratch / "checkpoint.json"
        state = context.seed + sum(read_values(context.inputs.get("start", ())))
        step = 0
        if path.exists():
            saved = json.loads(path.read_text())
            step, state = int(saved["step"]), int(saved["state"])
            context.log(f"continues at step {step}")
        while step < config.steps:
            if step == config.crash_at and not (context.scratch / "crashed.json").exists():
                save(context.scratch / "crashed.json", {"step": step})
                crash(config.crash_how, f"crashes on purpose at step {step}")
            if config.step_s and not (config.hurry and Path(config.hurry).exists()):
                time.sleep(config.step_s)
            state = (state * 6364136223846793005 + step) % _PRIME
            step += 1
            context.progress(step, config.steps, loss=1.0 / step)
            if step % config.checkpoint_every == 0 and step < config.steps:
                save(path, {"step": step, "state": state})
                context.check()
        context.metrics({"toy/steps": float(step)}, step=step)
        return write_value(context.output, state)
