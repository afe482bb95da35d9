"""A loop whose result depends on every step, with checkpoints and a journal of the steps really executed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from pydantic import Field

from orchestrator.stages.base import StageConfig
from workers.context import Reporter

JOURNAL = "MOEPIPE_TEST_JOURNAL"
_PRIME = 2**61 - 1


class StepsConfig(StageConfig):
    """Length of the loop."""

    steps: int = Field(40, ge=1, description="Steps of the loop.")
    step_s: float = Field(0.05, ge=0, description="Seconds of a step.")
    checkpoint_every: int = Field(5, ge=1, description="Steps between checkpoints.")
    count: int = Field(1, ge=1, description="Members of the fan-out.")


def count(config: StepsConfig, name: str, start: int, scratch: Path, reporter: Reporter) -> int:
    """Run the steps that are left; the final state follows from ``start`` and all steps alone."""
    path = scratch / "checkpoint.json"
    name = f"{name}@{scratch.name[:8]}"  # members of two stages may have the same name; their scratch folders differ
    step, state = 0, start
    if path.exists():
        saved = json.loads(path.read_text())
        step, state = int(saved["step"]), int(saved["state"])
        reporter.log(f"Resumed at step {step} of {config.steps}.")
    while step < config.steps:
        note(name, step)
        time.sleep(config.step_s)
        state = (state * 6364136223846793005 + step) % _PRIME
        step += 1
        reporter.progress(step, config.steps, loss=1.0 / step)
        if step % config.checkpoint_every == 0:
            aside = path.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"step": step, "state": state}))
            os.replace(aside, path)
            reporter.check()
    return state


def note(member: str, step: int) -> None:
    """One line to the journal in one write; appending is atomic for lines this short."""
    if path := os.environ.get(JOURNAL):
        line = f"{time.time():.3f} {member} {step}"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)
