"""Training in miniature, in segments: a weight with momentum on its way to 1."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, StageBase, StageConfig
from tests.support.toy_stages._files import save, write_value
from workers.context import Context
from workers.segments import STATE, segment_of


class GrowConfig(StageConfig):
    """How it grows."""

    rate: float = Field(0.1, gt=0, description="Share of the way in each step; above 2 it never arrives.")
    form: str = Field("plain", description="Anything.")
    width: int = Field(1, ge=1, description="What cannot change half-way.")
    steps: int = Field(12, ge=1, description="Steps in all.")
    step_s: float = Field(0.0, ge=0, description="Seconds of a step.")
    fail_above: float = Field(9.0, description="Larger rates raise an error.")
    die_at: int | None = Field(None, description="Step at which the process is killed, the first time.")


class Stage(StageBase[GrowConfig]):
    """Grows a number."""

    output = "number"
    changeable: ClassVar = ("rate", "form", "step_s")
    Config = GrowConfig

    def run(self, config: GrowConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Grow; the score is the nearness to 1, the trace every step with its rate."""
        segment = segment_of(member.params, context.inputs)
        path = context.scratch / "state.json"
        state = {"w": 0.0, "v": 0.0, "trace": []}
        if path.exists():
            state = json.loads(path.read_text())
            context.log(f"continues at step {len(state['trace'])}")
        elif segment is not None and segment.start is not None:
            state = json.loads((segment.start / "state.json").read_text())
        end = config.steps if segment is None else min(segment.until, config.steps)
        while len(state["trace"]) < end:
            step = len(state["trace"])
            if step == config.die_at and not (context.scratch / "died").exists():
                (context.scratch / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if config.rate > config.fail_above:
                raise RuntimeError(f"rate = {config.rate:g} is too much")
            time.sleep(config.step_s)
            state["v"] = 0.5 * state["v"] + config.rate * (1 - state["w"])
            state["w"] += state["v"]
            state["trace"].append(config.rate)
            save(path, state)
            context.progress(step + 1, config.steps)
            context.check()
        (context.output / "trace.json").write_text(json.dumps(state))
        more = {}
        if end < config.steps:
            save(context.output / STATE / "state.json", state)
            more["segment"] = {"updates": end, "left": config.steps - end}
        return {**write_value(context.output, 0), "scores": {"near": 1 - abs(1 - state["w"])}, **more}
