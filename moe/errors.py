"""Errors that people read: one sentence with the value seen, one that says what to do.

Every class carries a stable ``code`` (its section in ``docs/errors.md``) and the exit code of the command line.
The texts may change, the codes may not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MoepipeError(Exception):
    """Base of all errors a user can cause or meet.

    Args:
        message: what is wrong, with the value seen.
        hint: what to do about it; may be empty.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class RunFailed(MoepipeError):
    """A stage of the run failed after its retries."""

    code = "run-failed"
    exit_code = 1


class SpecError(MoepipeError):
    """The YAML, an override or a command-line argument is wrong."""

    code = "spec"
    exit_code = 2


class InfeasibleError(MoepipeError):
    """The cluster cannot fit what the pipeline asks for."""

    code = "infeasible"
    exit_code = 3


class NotFoundError(MoepipeError):
    """A run, an artifact, a dataset file or a name does not exist."""

    code = "not-found"
    exit_code = 4


class EnvironmentProblem(MoepipeError):
    """The machine is at fault: disk full, port in use, a package missing."""

    code = "environment"
    exit_code = 5


class DataError(MoepipeError):
    """A dataset file is corrupt or does not follow its official layout."""

    code = "data"
    exit_code = 6


class CheckpointError(MoepipeError):
    """A weights file is truncated, of another model, or not safe to load."""

    code = "checkpoint"
    exit_code = 6


class BusyError(MoepipeError):
    """Another process is working on the same run."""

    code = "busy"
    exit_code = 7


class GateRefused(MoepipeError):
    """The declared promotion gate does not let a model through."""

    code = "gate"
    exit_code = 8


class Interrupted(MoepipeError):
    """The user asked to stop; the state up to the last checkpoint is kept."""

    code = "interrupted"
    exit_code = 130


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint that suggests the nearest of the allowed names and lists them all.

    Args:
        name: what the user wrote.
        allowed: the names that would have been right.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    suggestion = f"Did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}Allowed: {', '.join(names) or 'nothing'}."
