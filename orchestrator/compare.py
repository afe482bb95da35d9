"""The comparison of runs: which rows there are, what stands in their cells, and how sure the differences are.

The run store is read directly (MLflow is a projection of it). Scores of different data sets, protocols or selection
rules are not put side by side unless that is asked for, and then marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moe.errors import NotFoundError, SpecError, nearest
from orchestrator.compare_difference import level_words, set_differences
from orchestrator.compare_read import RunFacts
from orchestrator.compare_result import Observation, Options, Setting
from orchestrator.compare_rows import AVERAGE, WORST, Cell, Row, letter, make_rows

__all__ = [
    "AVERAGE", "WORST", "Cell", "Comparison", "Options", "Row", "compare", "letter", "level_words", "read_all",
]  # fmt: skip
_TOLD = 3


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
    rows = make_rows(found)
    settings = list(dict.fromkeys(row.setting for row in rows))
    for row in rows:
        row.group = settings.index(row.setting)
    _check_metric(rows, options.metric)
    domains = list(dict.fromkeys(name for row in rows for name in row.domains))
    notes += _coverage(rows, domains) + _budgets(rows)
    baseline = set_differences(rows, options)
    rows.sort(key=lambda row: not row.baseline)
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
