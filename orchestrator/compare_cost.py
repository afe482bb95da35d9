"""What a model cost to train: device-hours of everything that it was made from, from the event log.

A member that was a hit counts with the time that its first making took, which its key's record knows: the figure is the
cost of making the model from nothing, not what one run happened to spend. A search counts with all of its trials; those
that failed or were stopped left no record of their time. Preparing data is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from moe.errors import MoepipeError
from orchestrator.compare_read import Made, RunFacts
from orchestrator.compare_result import Hours
from orchestrator.store import Store

_NOT_TRAINING = ("prepare", "text_prepare")
SEARCH, TRIALS = "search", "search/trials.json"


class Spent(NamedTuple):
    """Seconds of some members together, how many they are, and how many of them left no record of their time."""

    seconds: float
    members: int
    unknown: int


class Clock:
    """Seconds of members; the records of hits are read once each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seconds: dict[str, float | None] = {}
        self._stages: dict[tuple[str, str, int | None], Spent] = {}

    def seconds(self, made: Made) -> float | None:
        """Time that making it took; None when nobody knows any more."""
        if made.seconds is not None:
            return made.seconds
        if made.key not in self._seconds:
            record = self._store.record(made.key) if made.key else None
            self._seconds[made.key] = None if record is None else record.seconds
        return self._seconds[made.key]

    def stage(self, run: RunFacts, name: str, seed: int | None) -> Spent:
        """What a stage's members of one seed took."""
        place = (run.id, name, seed)
        if place not in self._stages:
            self._stages[place] = self.members(run, name, (made for _, made in run.of_stage(name, seed)))
        return self._stages[place]

    def members(self, run: RunFacts, name: str, members: Iterable[Made]) -> Spent:
        """What some members of a stage took; a search's trials instead of the search."""
        times: list[float | None] = []
        for made in members:
            trials = self._trials(made.digest) if run.stages[name].kind == SEARCH else None
            times += [self.seconds(made)] if trials is None else trials
        known = [seconds for seconds in times if seconds is not None]
        return Spent(sum(known), len(times), len(times) - len(known))

    def _trials(self, digest: str) -> list[float | None] | None:
        """Seconds of each run of a search's trials; None when its record is gone."""
        try:
            trials = json.loads(self._store.blobs.read(f"artifacts/{digest}/{TRIALS}") or b"")["trials"]
        except (MoepipeError, ValueError, KeyError):
            return None
        made = {artifact for trial in trials for artifact in trial["artifacts"]}
        lost = [None for trial in trials if trial["state"] != "done"]
        return [self._by_artifact.get(artifact) for artifact in sorted(made)] + lost

    @cached_property
    def _by_artifact(self) -> dict[str, float]:
        return {record.artifact: record.seconds for record in self._store.records()}


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
    spent = clock.members(run, stage, [run.made[node] for node in nodes])
    return Hours(device, spent.seconds * devices / 3600, spent.unknown) if spent.members else None


def _total(spent: dict[str, float], missing: int) -> Hours:
    device = "GPU" if spent.get("GPU") else "CPU"
    return Hours(device, spent.get(device, 0.0), missing)
