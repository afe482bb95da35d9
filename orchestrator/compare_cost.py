"""What a model cost to train: device-hours of everything that it was made from, from the event log.

A member that was a hit counts with the time that its first making took, which its key's record knows: the figure is the
cost of making the model from nothing, not what one run happened to spend. Preparing data is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.compare_read import Made, RunFacts
from orchestrator.compare_result import Hours
from orchestrator.store import Store

_NOT_TRAINING = ("prepare", "text_prepare")


class Clock:
    """Seconds of members; the records of hits are read once each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seconds: dict[str, float | None] = {}
        self._stages: dict[tuple[str, str, int | None], tuple[float, int, int]] = {}

    def seconds(self, made: Made) -> float | None:
        """Time that making it took; None when nobody knows any more."""
        if made.seconds is not None:
            return made.seconds
        if made.key not in self._seconds:
            record = self._store.record(made.key) if made.key else None
            self._seconds[made.key] = None if record is None else record.seconds
        return self._seconds[made.key]

    def stage(self, run: RunFacts, name: str, seed: int | None) -> tuple[float, int, int]:
        """Seconds of a stage's members of one seed together, how many they are, and how many of unknown time."""
        place = (run.id, name, seed)
        if place not in self._stages:
            times = [self.seconds(made) for _, made in run.of_stage(name, seed)]
            known = [seconds for seconds in times if seconds is not None]
            self._stages[place] = sum(known), len(times), len(times) - len(known)
        return self._stages[place]


def training_hours(run: RunFacts, stages: Sequence[str], seed: int | None, clock: Clock) -> Hours | None:
    """Device-hours of ``stages`` and all that they are made from, for one seed. GPU-hours when a GPU took part.

    None when the stages made nothing.
    """
    spent: dict[str, float] = {}
    missing = count = 0
    for name in run.closure(stages):
        stage = run.stages[name]
        if stage.kind in _NOT_TRAINING:
            continue
        device, devices = stage.devices
        seconds, members, unknown = clock.stage(run, name, seed)
        spent[device] = spent.get(device, 0.0) + seconds * devices / 3600
        count, missing = count + members, missing + unknown
    return _total(spent, missing) if count else None


def members_hours(run: RunFacts, stage: str, nodes: Sequence[str], clock: Clock) -> Hours | None:
    """Device-hours of some members of one stage."""
    device, devices = run.stages[stage].devices
    seconds = [clock.seconds(run.made[node]) for node in nodes]
    known = [value for value in seconds if value is not None]
    return Hours(device, sum(known) * devices / 3600, len(seconds) - len(known)) if seconds else None


def _total(spent: dict[str, float], missing: int) -> Hours:
    device = "GPU" if spent.get("GPU") else "CPU"
    return Hours(device, spent.get(device, 0.0), missing)
