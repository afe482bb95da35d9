"""A part of a training run: from the state in which another part ended, up to a number of updates.

A run that changes its settings half-way (population-based training) is a chain of such segments. Each is an artifact of
its own: the network as it is at its end, and beside it in ``state/`` all that the next one goes on from: weights,
moments of the optimiser, averages, counters. Random numbers and batches are functions of (seed, update), so nothing
else is needed, and a chain whose settings never change ends with the bytes of an undivided run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import SpecError
from workers.context import Input

UNTIL = "~until"
"""Parameter of a member that is a segment: updates after which it ends."""
FROM = "~from"
"""Input of such a member: the segment before it; the first one has none."""
STATE = "state"
"""Folder of an artifact that another segment can go on from."""


@dataclass(frozen=True)
class Segment:
    """Which part of a run.

    Attributes:
        until: updates, counted from the beginning of the chain, after which it ends.
        start: folder with the state that it goes on from; None: from the beginning.
    """

    until: int
    start: Path | None = None


def segment_of(params: Mapping[str, Any], inputs: Mapping[str, Sequence[Input]]) -> Segment | None:
    """The segment that a member is; None for a whole run.

    Raises:
        SpecError: the artifact before it holds no state.
    """
    if UNTIL not in params:
        return None
    before = inputs.get(FROM, ())
    if not before:
        return Segment(int(params[UNTIL]))
    start = before[0].path / STATE
    if not start.is_dir():
        raise SpecError(f"Artifact {before[0].digest[:12]} is not a segment: it holds no training state.")
    return Segment(int(params[UNTIL]), start)
