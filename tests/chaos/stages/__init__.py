"""Two torch-free stages that write down every step they execute, so that work done twice is counted exactly."""

from orchestrator.stages.base import STAGES

KINDS = ("steps", "gang_steps")


def register() -> None:
    """Make the kinds known to this process (idempotent)."""
    for kind in KINDS:
        STAGES.add(kind, f"{__name__}.{kind}")
