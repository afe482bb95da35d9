"""Rows of a comparison: which observations are one row, what stands in its cells, and what it is called.

Seeds of one method with the same settings make one row, also across runs; the same method with other settings makes
another row that says what is different.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.compare_result import Hours, ModelCost, Observation, Setting
from orchestrator.compare_stats import Difference, mean_error
from orchestrator.tracking_state import flatten

AVERAGE, WORST = "avg", "worst"
_TOLD = 3


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, its standard error (None for one seed), and how many seeds."""

    mean: float
    error: float | None
    seeds: int


@dataclass
class Row:
    """One line.

    Attributes:
        id: stable name, unique in the comparison.
        label: for people, with what makes it differ from its namesakes.
        method, adaptation, selection: what it is.
        setting: what its scores are of.
        observations: one for each run, seed and held-out domain.
        group: number of its setting in :attr:`Comparison.settings`.
        difference: to the baseline; None without one, or for the baseline itself.
        baseline: it is the baseline.
        values: seed -> domain -> score.
        shared: further runs that hold the same results, as hits.
    """

    id: str
    label: str
    method: str
    adaptation: str
    selection: str
    setting: Setting
    observations: list[Observation]
    group: int = 0
    difference: Difference | None = None
    baseline: bool = False
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    @cached_property
    def runs(self) -> list[str]:
        """Ids of its runs, those included whose results are the same artifacts."""
        return list(dict.fromkeys([*(item.run for item in self.observations), *self.shared]))

    @cached_property
    def seeds(self) -> list[int]:
        """Its seeds."""
        return sorted(self.values)

    @cached_property
    def domains(self) -> list[str]:
        """Its domains."""
        return list(dict.fromkeys(name for scores in self.values.values() for name in scores))

    @property
    def percent(self) -> bool:
        """Its scores are shares."""
        return self.observations[0].percent

    @property
    def steps(self) -> list[int]:
        """Updates that its models were trained for."""
        return sorted({item.steps for item in self.observations if item.steps is not None})

    def domain(self, name: str) -> Cell | None:
        """Its score on a domain."""
        return _cell([scores[name] for scores in self.values.values() if name in scores])

    def per_seed(self, metric: str) -> dict[int, float]:
        """The score ``metric`` of each seed."""
        if metric == AVERAGE:
            return {seed: sum(scores.values()) / len(scores) for seed, scores in self.values.items()}
        if metric == WORST:
            return {seed: min(scores.values()) for seed, scores in self.values.items()}
        found: dict[int, list[float]] = {}
        for item in self.observations:
            if metric in item.scores:
                found.setdefault(item.seed, []).append(float(item.scores[metric]))
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    def cell(self, metric: str) -> Cell | None:
        """The score ``metric``."""
        return _cell(list(self.per_seed(metric).values()))

    @cached_property
    def worst_name(self) -> str:
        """The domain with the lowest mean."""
        means = {name: cell.mean for name in self.domains if (cell := self.domain(name))}
        return min(means, key=lambda name: means[name])

    @cached_property
    def cost(self) -> ModelCost:
        """Means over what its observations recorded."""

        def mean(read: Callable[[ModelCost], float | None]) -> float | None:
            values = [value for item in self.observations if (value := read(item.cost)) is not None]
            return sum(values) / len(values) if values else None

        return ModelCost(
            mean(lambda cost: cost.parameters),
            mean(lambda cost: cost.active_parameters),
            mean(lambda cost: cost.flops),
            mean(lambda cost: cost.latency_ms),
        )

    @cached_property
    def hours(self) -> Hours | None:
        """Mean device-hours of one trained model."""
        found = [item.hours for item in self.observations if item.hours is not None]
        if not found:
            return None
        device = found[0].device
        own = [hours for hours in found if hours.device == device]
        return Hours(device, sum(hours.hours for hours in own) / len(own), max(hours.missing for hours in own))


def make_rows(found: Sequence[Observation]) -> list[Row]:
    """One row for each method, selection rule, setting and way of making it, with unique names."""
    groups: dict[tuple[Any, ...], list[Observation]] = {}
    for item in found:
        groups.setdefault((item.name, item.selection, item.setting, item.identity), []).append(item)
    rows = []
    for own in groups.values():
        rows += [_row(part, shared) for part, shared in _split(own)]
    _name(rows)
    return rows


def _split(own: Sequence[Observation]) -> list[tuple[list[Observation], list[str]]]:
    """Seeds and held-out domains of one method, and runs that hold the same results once more.

    Results that contradict each other are kept apart by run.
    """
    seen: dict[tuple[int, str], float] = {}
    clash = False
    kept: list[Observation] = []
    shared: list[str] = []
    for item in own:
        places = {(item.seed, domain): score for domain, score in item.domains.items()}
        known = [place for place in places if place in seen]
        if len(known) == len(places) and all(seen[place] == places[place] for place in known):
            shared.append(item.run)  # a hit in another run
            continue
        clash = clash or bool(known)
        seen.update(places)
        kept.append(item)
    if not clash:
        return [(kept, shared)]
    parts: dict[str, list[Observation]] = {}
    for item in own:
        parts.setdefault(item.run, []).append(item)
    return [(part, []) for part in parts.values()]


def _row(own: list[Observation], shared: list[str]) -> Row:
    first = own[0]
    row = Row(first.name, first.label, first.method, first.adaptation, first.selection, first.setting, own)
    row.shared = shared
    for item in own:
        row.values.setdefault(item.seed, {}).update(item.domains)
    return row


def _name(rows: Sequence[Row]) -> None:
    """Give namesakes a suffix: the letter of their setting, the settings in which they differ, or their run."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    rules = {row.selection for row in rows}
    namesakes: dict[tuple[str, str, Setting], list[Row]] = {}
    flattened: dict[str, dict[str, str]] = {}
    for row in rows:
        namesakes.setdefault((row.id, row.selection, row.setting), []).append(row)
    for own in namesakes.values():
        for row in own if len(own) > 1 else ():
            if row.observations[0].identity not in flattened:
                flattened[row.observations[0].identity] = _flat(row)
        flat = [flattened.get(row.observations[0].identity, {}) for row in own]
        keys = list(dict.fromkeys(key for values in flat for key in values))
        varying = [key for key in keys if len({values.get(key) for values in flat}) > 1]
        suffixes = [_suffix(values, varying) for values in flat]
        counts = Counter(suffixes)
        for row, suffix in zip(own, suffixes, strict=True):
            told = [letter(settings.index(row.setting))] if len(settings) > 1 else []
            told += [suffix] if suffix else []
            if len(own) > 1 and (not suffix or counts[suffix] > 1):
                told.append(f"run {row.runs[0].rsplit('-', 1)[-1]}")
            if told:
                row.label = f"{row.label} [{', '.join(told)}]"
                row.id = f"{row.id}@{','.join(told).replace(', ', ',').replace('run ', '')}"
            if len(rules) > 1:
                row.id = f"{row.id}/{row.selection}"


def letter(number: int) -> str:
    """``a``, ``b``, ... for settings; ``s27`` after ``z``."""
    return chr(ord("a") + number) if number < 26 else f"s{number}"


def _flat(row: Row) -> dict[str, str]:
    return {key: value for stage, config in row.observations[0].config.items() for key, value in _stage(stage, config)}


def _stage(stage: str, config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    return flatten(config, f"{stage}.").items()


def _suffix(settings: Mapping[str, str], varying: Sequence[str]) -> str:
    shown = varying[:_TOLD]
    if not shown or len(varying) > 2 * _TOLD:
        return ""
    ends = [key.rsplit(".", 1)[-1] for key in shown]
    names = [end if ends.count(end) == 1 else key for key, end in zip(shown, ends, strict=True)]
    return ", ".join(f"{name}={settings.get(key, '-')}" for name, key in zip(names, shown, strict=True))


def _cell(values: Sequence[float]) -> Cell | None:
    return Cell(*mean_error(values), len(values)) if values else None
