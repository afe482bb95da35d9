"""The comparison of runs: which rows there are, what stands in their cells, and how sure the differences are.

The run store is read directly (MLflow is a projection of it). Seeds of one method with the same settings make one row,
also across runs; the same method with other settings makes another row that says what is different. Scores of
different data sets, protocols or selection rules are not put side by side unless that is asked for, and then marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moe.errors import NotFoundError, SpecError, nearest
from orchestrator.compare_read import RunFacts
from orchestrator.compare_result import Hours, ModelCost, Observation, Setting
from orchestrator.compare_stats import (
    Difference,
    Level,
    Predictions,
    by_domains,
    by_examples,
    by_seeds,
    holm,
    mean_error,
)
from orchestrator.tracking_state import flatten

AVERAGE, WORST = "avg", "worst"
REPLICATES = 2000
_MANY_FILES = 200  # more evaluations than this are not opened for their predictions
_TOLD = 3


@dataclass(frozen=True)
class Options:
    """What is compared and how.

    Attributes:
        metric: ``avg`` (mean over domains), ``worst`` (worst domain) or the name of a score over all rows.
        baseline: a row, by its method's name, or a run, against which every row is tested; empty: ERM if it is there.
        selection: only this selection rule; empty: all.
        allow_different: compare what should not be compared, and mark it.
        level: what the bootstrap resamples besides seeds; ``auto`` takes the finest that is stored.
        replicates: resamples.
        watts: of one device, for an energy estimate; None: no estimate.
    """

    metric: str = AVERAGE
    baseline: str = ""
    selection: str = ""
    allow_different: bool = False
    level: str = "auto"
    replicates: int = REPLICATES
    watts: float | None = None


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


@dataclass(frozen=True)
class Comparison:
    """Rows over common columns.

    Attributes:
        rows: in order.
        domains: columns.
        settings: what scores are of; more than one only where that was allowed.
        runs: ids of the runs that gave a row.
        baseline: id of the row that the others are tested against, or of the run; empty without one.
        options: what was asked for.
        notes: what must be said beside the numbers.
    """

    rows: list[Row]
    domains: list[str]
    settings: list[Setting]
    runs: list[str]
    baseline: str
    options: Options
    notes: list[str]

    @property
    def selections(self) -> list[str]:
        """Selection rules that occur."""
        return list(dict.fromkeys(row.selection for row in self.rows))


def compare(observations: Iterable[Observation], options: Options) -> Comparison:
    """Put observations side by side.

    Raises:
        NotFoundError: nothing to compare, no such baseline or metric.
        SpecError: they are not comparable.
    """
    found = list(observations)
    if options.selection:
        rules = {item.selection for item in found}
        found = [item for item in found if item.selection == options.selection]
        if not found and rules:
            raise NotFoundError(f"No result was selected by {options.selection!r}.", nearest(options.selection, rules))
    if not found:
        raise NotFoundError(
            "These runs have no results to compare.",
            "Results are made by the stages evaluate, sweep, m2mkd_evaluate, jetpack_train and text_evaluate.",
        )
    notes = _check(found, options.allow_different)
    rows = _rows(found)
    settings = list(dict.fromkeys(row.setting for row in rows))
    for row in rows:
        row.group = settings.index(row.setting)
    _check_metric(rows, options.metric)
    domains = list(dict.fromkeys(name for row in rows for name in row.domains))
    notes += _coverage(rows, domains) + _budgets(rows)
    baseline = _test(rows, options)
    runs = list(dict.fromkeys(run for row in rows for run in row.runs))
    return Comparison(rows, domains, settings, runs, baseline, options, notes)


def read_all(reader: Any, facts: Iterable[RunFacts]) -> tuple[list[Observation], list[str]]:
    """Observations of all runs, newest run first, and the ids of the runs that have none."""
    found: list[Observation] = []
    empty = []
    for run in facts:
        own = list(reader.observations(run))
        found += own
        if not own:
            empty.append(run.id)
    return found, empty


# ---- what may be compared ----


def _check(found: Sequence[Observation], allowed: bool) -> list[str]:
    """Notes about what differs, when that is allowed."""
    problems = []
    settings = list(dict.fromkeys(item.setting for item in found))
    for other in settings[1:]:
        problems += [text for text in settings[0].differences(other) if text not in problems]
    rules: dict[str, set[str]] = {}
    prepared: dict[tuple[Setting, str], set[str]] = {}
    for item in found:
        rules.setdefault(item.run, set()).add(item.selection)
        for domain in item.domains if item.data else ():
            prepared.setdefault((item.setting, domain), set()).add(item.data)
    if not set.intersection(*rules.values()):
        every = sorted({rule for own in rules.values() for rule in own})
        problems.append(f"selection rule: {' and '.join(every)}")
    changed = sorted(domain for (_, domain), digests in prepared.items() if len(digests) > 1)
    if changed:
        problems.append(f"what is held out, or the files of the data set, behind the domain {changed[0]}")
    if problems and not allowed:
        shown = "; ".join(problems[:_TOLD]) + (f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else "")
        raise SpecError(
            f"These runs are not comparable, they differ in: {shown}.",
            "Compare runs of one kind (--pipeline NAME, --selection RULE), or mark them with --allow-different.",
        )
    return [f"Not comparable as it stands, different: {text}." for text in problems]


def _check_metric(rows: Sequence[Row], metric: str) -> None:
    if metric in (AVERAGE, WORST):
        return
    known = {name for row in rows for item in row.observations for name in item.scores}
    if metric not in known:
        raise NotFoundError(f"No result has the score {metric!r}.", nearest(metric, [AVERAGE, WORST, *known]))


def _coverage(rows: Sequence[Row], domains: Sequence[str]) -> list[str]:
    for row in rows:
        missing = [name for name in domains if name not in row.domains]
        if missing:
            return [
                f"Rows are of different domains ({row.label} lacks {', '.join(missing[:_TOLD])}): their averages are "
                "over what each has; differences are over what both have."
            ]
    return []


def _budgets(rows: Sequence[Row]) -> list[str]:
    notes = []
    scales = sorted({item.scale for row in rows for item in row.observations})
    notes.append(f"Scale: {', '.join(scales)}.")
    if len({tuple(row.steps) for row in rows if row.steps and row.method != "oracle"}) > 1:
        notes.append("Rows are trained for different numbers of updates, see the costs.")
    if any(item.miniature for row in rows for item in row.observations):
        notes.append("Some data is a generated miniature: these numbers test the pipeline, not the method.")
    return notes


# ---- rows ----


def _rows(found: Sequence[Observation]) -> list[Row]:
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


# ---- differences ----


def _test(rows: list[Row], options: Options) -> str:
    """Set the differences to the baseline; returns what it is called."""
    chosen, is_run = _baselines(rows, options.baseline)
    if not chosen:
        return ""
    predictions = Predictions() if _opens_predictions(rows, options) else None
    partners = _Partners(chosen, is_run)
    waiting: list[tuple[Row, Any]] = []
    for row in rows:
        row.baseline = any(row is one for one in chosen)
        other = partners.of(row)
        if other is None or other is row:
            continue
        found = _difference(row, other, options, predictions)
        if isinstance(found, Difference):
            row.difference = found
        elif found is not None:
            waiting.append((row, found))
    pairs = zip(waiting, by_domains([scores for _, scores in waiting], options.replicates, seed=0), strict=True)
    for (row, _), difference in pairs:
        row.difference = difference
    corrected = holm([row.difference.p if row.difference else None for row in rows])
    for row, value in zip(rows, corrected, strict=True):
        if row.difference is not None:
            row.difference = replace(row.difference, corrected=value)
    names = {row.observations[0].label for row in chosen}
    return options.baseline or names.pop()


def _baselines(rows: Sequence[Row], wanted: str) -> tuple[list[Row], bool]:
    """The rows that others are tested against: of one method, or (True) of one run."""
    if not wanted:
        return [row for row in rows if row.method.lower() == "erm" and not row.adaptation], False
    exact = [row for row in rows if wanted in (row.id, row.label)]
    named = exact or [row for row in rows if wanted.lower() in _names(row)]
    if named:
        return named, False
    of_run = [row for row in rows if any(run.startswith(wanted) or run.endswith(f"-{wanted}") for run in row.runs)]
    if not of_run:
        names = {name for row in rows for name in (row.id, row.observations[0].name)}
        raise NotFoundError(f"There is no row or run {wanted!r} to compare with.", nearest(wanted, names))
    return of_run, True


def _names(row: Row) -> set[str]:
    first = row.observations[0]
    return {first.name.lower(), first.label.lower()}


class _Partners:
    """Which baseline a row is tested against.

    Args:
        chosen: the baselines.
        is_run: they are a run's, so that each method is compared with itself there.
    """

    def __init__(self, chosen: Sequence[Row], is_run: bool) -> None:
        self._is_run = is_run
        self._able: dict[tuple[Setting, str], list[Row]] = {}
        for row in chosen:
            self._able.setdefault((row.setting, row.selection), []).append(row)
        self._by_run = {
            (place, run): row for place, able in self._able.items() for row in reversed(able) for run in row.runs
        }
        self._by_kind = {(place, _kind(row)): row for place, able in self._able.items() for row in reversed(able)}

    def of(self, row: Row) -> Row | None:
        """The baseline of its own setting and selection rule: of its run or kind where there are several."""
        place = (row.setting, row.selection)
        if place not in self._able or row.baseline:
            return None
        same_kind = self._by_kind.get((place, _kind(row)))
        if self._is_run:
            return same_kind
        same_run = next((self._by_run[place, run] for run in row.runs if (place, run) in self._by_run), None)
        return same_run or same_kind or self._able[place][0]


def _kind(row: Row) -> str:
    return row.observations[0].name


def _opens_predictions(rows: Sequence[Row], options: Options) -> bool:
    files = {item.digest for row in rows for item in row.observations if item.examples}
    return options.metric == AVERAGE and (
        options.level == "examples" or (options.level == "auto" and len(files) <= _MANY_FILES)
    )


def _difference(row: Row, other: Row, options: Options, predictions: Predictions | None) -> Any:
    """The difference; or ``[S, D]`` differences of domains that are still to be resampled; or None."""
    import numpy as np

    seeds = [seed for seed in row.seeds if seed in other.seeds]
    domains = [name for name in row.domains if name in other.domains]
    if not seeds or not domains:
        return None
    full = all(name in rows.values[seed] for rows in (row, other) for seed in seeds for name in domains)
    if options.metric == AVERAGE and full:
        if predictions is not None:
            answers = _answers(row, other, seeds, domains, predictions)
            if answers:
                return by_examples(answers, options.replicates, seed=0)
        scores = np.array([[row.values[s][d] - other.values[s][d] for d in domains] for s in seeds])
        if options.level in ("auto", "domains"):
            return scores
        return by_seeds(scores.mean(axis=1), options.replicates, seed=0)
    mine, theirs = row.per_seed(options.metric), other.per_seed(options.metric)
    paired = [mine[seed] - theirs[seed] for seed in seeds if seed in mine and seed in theirs]
    return by_seeds(np.array(paired), options.replicates, seed=0) if paired else None


def _answers(
    row: Row, other: Row, seeds: Sequence[int], domains: Sequence[str], predictions: Predictions
) -> dict[str, Any]:
    """Domain -> ``[S, N]`` differences of correctness; empty unless both scored the same images for every seed."""
    import numpy as np

    sides = [_by_seed(side, predictions) for side in (row, other)]
    found: dict[str, Any] = {}
    for domain in domains:
        try:
            pairs = [(sides[0][seed][domain], sides[1][seed][domain]) for seed in seeds]
        except KeyError:
            return {}
        rows = pairs[0][0][0]
        if any(not np.array_equal(part[0], rows) for pair in pairs for part in pair):
            return {}
        found[domain] = np.stack([mine[1] - theirs[1] for mine, theirs in pairs])
    return found


def _by_seed(row: Row, predictions: Predictions) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for item in row.observations:
        if item.examples is not None:
            answers = predictions.correct(item.examples, list(item.domains), item.counts)
            found.setdefault(item.seed, {}).update(answers)
    return found


def level_words(level: Level) -> str:
    """What a bootstrap level means, for notes."""
    return {
        "examples": "test images and seeds",
        "domains": "domains and seeds",
        "seeds": "seeds",
        "none": "nothing (too few seeds)",
    }[level]
