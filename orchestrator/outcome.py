"""How a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe.errors import MoepipeError
from orchestrator.runs import Status


@dataclass(frozen=True)
class Failure:
    """Why a node has no artifact.

    Attributes:
        node: id.
        cause: what the last failure was charged to; ``upstream`` when it was never started.
        error: for people.
        log: path of its log.
    """

    node: str
    cause: str
    error: MoepipeError
    log: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``finished``, ``failed`` or ``interrupted``.
        artifacts: node -> digest.
        failures: node -> failure, skipped nodes included.
        hits: how many of the artifacts were there already.
    """

    status: Status
    artifacts: Mapping[str, str]
    failures: Mapping[str, Failure]
    hits: int = 0

    @property
    def error(self) -> MoepipeError | None:
        """The first failure that is not the consequence of another one."""
        own = [failure.error for failure in self.failures.values() if failure.cause != "upstream"]
        return own[0] if own else None
