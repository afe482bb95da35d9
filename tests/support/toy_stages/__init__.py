"""Tiny torch-free stages for the tests of the orchestrator; importing this package registers them.

``numbers`` makes numbers, ``sum`` adds them, ``square`` mirrors a fan-out member by member, ``gather`` works over all
seeds, ``sleepy`` is a resumable loop, ``gang`` runs a function through ``context.train``, ``score`` is
something to search over, ``grow`` something that a population can train.
Every artifact is ``value.json`` (``{"value": n}``) and its meta repeats the value.
"""

from orchestrator.stages.base import STAGES

KINDS = ("numbers", "sum", "square", "gather", "sleepy", "gang", "score", "grow")


def register() -> None:
    """Make the toy kinds known to this process (idempotent)."""
    for kind in KINDS:
        STAGES.add(kind, f"{__name__}.{kind}")


register()
