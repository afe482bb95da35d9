"""Something to search over: a score with its maximum at x = 0.3, reached over some steps with checkpoints between."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from tests.support.toy_stages._files import read_values, save, write_value
from workers.context import Context


class ScoreConfig(StageConfig):
    """Where the score is taken, how long that lasts, and how it fails."""

    x: float = Field(0.9, ge=0, le=1, description="The score is 1 - (x - 0.3)^2.")
    cost: int = Field(1, ge=0, description="A second number, to be small.")
    form: Literal["plain", "bent"] = Field("plain", description="bent: minus bend.")
    bend: float = Field(0.0, ge=0, le=1, description="Of the bent form.")
    nested: dict[str, Any] = Field(default_factory=dict, description="Anything.")
    noise: float = Field(0.0, ge=0, description="Times a number in [0, 1) that the seed decides.")
    steps: int = Field(1, ge=1, description="Steps of the loop.")
    step_s: float = Field(0.0, ge=0, description="Seconds of a step.")
    fail_above: float = Field(2.0, description="Larger x raise an error.")
    nan_above: float = Field(2.0, description="Larger x score NaN.")
    die_at: int | None = Field(None, description="Step at which the process is killed, the first time.")
    freeze_at: int | None = Field(None, description="Step at which the process stands still for good, the first time.")
    val_split: str = Field("val", description="Rows that are scored.")


class Stage(StageBase[ScoreConfig]):
    """Scores a number."""

    output = "number"
    inputs: ClassVar[Mapping[str, Port]] = {"start": Port("number", optional=True, doc="Added to the score.")}
    Config = ScoreConfig

    def run(self, config: ScoreConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Walk towards the score; ``meta`` has it under ``scores.score``."""
        if config.x > config.fail_above:
            raise RuntimeError(f"x = {config.x:g} is too much")
        score = 1 - (config.x - 0.3) ** 2 - (config.bend if config.form == "bent" else 0)
        score += sum(read_values(context.inputs.get("start", ()))) + config.noise * (context.seed % 997) / 997
        path = context.scratch / "step.json"
        done = int(json.loads(path.read_text())["step"]) if path.exists() else 0
        if done:
            context.log(f"continues at step {done}")
        for step in range(done, config.steps):
            ends = {config.die_at: signal.SIGKILL, config.freeze_at: signal.SIGSTOP}
            if step in ends and not (context.scratch / "died").exists():
                (context.scratch / "died").touch()
                os.kill(os.getpid(), ends[step])
            time.sleep(config.step_s)
            context.progress(step + 1, config.steps, **{"val/score": score * (step + 1) / config.steps})
            save(path, {"step": step + 1})
            context.check()
        if config.x > config.nan_above:
            score = float("nan")
        (context.output / "trace.json").write_text(json.dumps({"x": config.x}))
        return {**write_value(context.output, 0), "scores": {"score": score, "cost": config.cost}}
