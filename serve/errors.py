"""What can go wrong with states, beyond the errors of :mod:`moe.errors`. Codes are stable: ``docs/errors.md``."""

from __future__ import annotations

from typing import ClassVar

from moe.errors import BusyError


class StaleState(BusyError):
    """A state belongs to another base model, or cannot be recomputed to the same bytes here."""

    code: ClassVar[str] = "stale-state"
    exit_code: ClassVar[int] = 7


class NoRoom(BusyError):
    """A limit is reached: states of one tenant, or bytes of pinned states."""

    code: ClassVar[str] = "no-room"
    exit_code: ClassVar[int] = 7
