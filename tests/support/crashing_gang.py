"""A gang whose last rank kills itself once, after rank 0 has left a checkpoint; registered by the tests that use it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestrator.stages.base import STAGES, Member, StageBase, StageConfig
from tests.support.toy_stages._files import save, write_value
from workers.context import Context

STAGES.add("crashing_gang", __name__)


class Config(StageConfig):
    """How the last rank ends."""

    how: str = Field("sigkill", description="sigkill, error, or interrupt (rank 0 sees the stop).")


def job(config: dict[str, Any]) -> None:
    """Three steps with a checkpoint each; all ranks meet after every step."""
    import torch.distributed as dist

    folder = Path(config["folder"])
    state = folder / "state.json"
    step = json.loads(state.read_text())["step"] if state.exists() else 0
    many = dist.is_initialized()
    rank = dist.get_rank() if many else 0
    while step < 3:
        step += 1
        if rank == 0:
            save(state, {"step": step})
            config["reporter"].progress(step, 3)
            config["reporter"].log(f"step {step}")
            config["reporter"].check()
        if many:
            dist.barrier()
            if rank == 1 and step == 2 and not (folder / "crashed").exists():
                (folder / "crashed").touch()
                if config["how"] == "sigkill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if config["how"] == "error":
                    raise ValueError("rank 1 is unhappy")
            if config["how"] == "interrupt":
                time.sleep(1.0)


class Stage(StageBase[Config]):
    """Trains."""

    output = "number"
    gang = True
    Config = Config

    def run(self, config: Config, member: Member, context: Context) -> Mapping[str, Any]:
        """Train, then tell the last step."""
        context.train(job, {"folder": str(context.scratch), "how": config.how})
        return write_value(context.output, json.loads((context.scratch / "state.json").read_text())["step"])
