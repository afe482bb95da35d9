"""Stages, two without torch and two that train; they write down every step, so work done twice is counted exactly."""

from orchestrator.stages.base import STAGES

KINDS = ("steps", "gang_steps", "train_steps", "gang_train")


def register() -> None:
    """Make the kinds known to this process (idempotent)."""
    for kind in KINDS:
        STAGES.add(kind, f"{__name__}.{kind}")
