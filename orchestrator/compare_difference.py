"""Differences of a comparison: which row is tested against which, on what, by which bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe.errors import NotFoundError, nearest
from orchestrator.compare_result import Options, Setting
from orchestrator.compare_rows import AVERAGE, Row
from orchestrator.compare_stats import Difference, Level, Predictions, by_domains, by_examples, by_seeds, holm

_MANY_FILES = 200  # more evaluations than this are not opened for their predictions


def set_differences(rows: list[Row], options: Options) -> str:
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
