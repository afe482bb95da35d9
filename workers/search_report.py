"""What a search leaves behind: ``best.yaml``, the table of trials (CSV, JSON, Markdown) and figures.

The figures are drawn by :mod:`workers.search_figures`. The same study gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workers.search_propose import Mode, frozen_trials, study_of
from workers.search_space import Space, identity

State = Literal["done", "failed", "stopped", "interrupted"]
_FEWEST = 4  # trials below which importance says nothing


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        number: from 0.
        values: point of the space.
        state: ``done``, ``failed`` or ``stopped`` (early, by the scheduler).
        objective: mean over the runs, one number per metric; None unless done.
        runs: numbers of each run.
        error: why it failed.
        source: ``search``, or ``earlier``: made by an earlier run. (Whether the search ran a trial itself or found
            it in the store depends on when it was cut off, so it is told in the log only.)
        artifacts: digests of the runs.
        curve: ``[update, score]`` as far as it was watched.
        steps: updates of a trial that was stopped.
        segment: of a population: ``generation``, ``member``, ``parent`` (a trial), ``copied`` (from another member),
            ``until`` (updates at its end), ``left`` (updates to its member's end; None if it failed).
    """

    number: int
    values: Mapping[str, Any]
    state: State
    objective: list[float] | None
    runs: list[list[float]] = field(default_factory=list)
    error: str = ""
    source: str = "search"
    artifacts: list[str] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    steps: int | None = None
    segment: Mapping[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether training came to its end in this trial, so that it may be given out."""
        return self.segment is None or self.segment["left"] == 0


@dataclass(frozen=True)
class Study:
    """A finished search."""

    stage: str
    metrics: list[str]
    modes: list[Mode]
    selection: str
    algorithm: str
    scheduler: str
    seeds: int
    space: Space
    rows: list[Row]

    @property
    def done(self) -> list[Row]:
        """Trials that have an objective."""
        return [row for row in self.rows if row.state == "done" and row.objective]

    @property
    def segmented(self) -> bool:
        """Whether trials are parts of longer runs."""
        return any(row.segment is not None for row in self.rows)

    @property
    def ends(self) -> list[Row]:
        """Trials in which training came to its end."""
        return [row for row in self.done if row.whole]


def front(rows: Sequence[Row], modes: Sequence[Mode]) -> list[Row]:
    """Trials that no other one beats in every metric, by number. Unfinished ones count while there are no others."""
    done = [row for row in rows if row.state == "done" and row.objective]
    done = [row for row in done if row.whole] or done
    signs = np.array([1.0 if mode == "max" else -1.0 for mode in modes])
    points = [np.array(row.objective) * signs for row in done]
    kept = []
    for row, own in zip(done, points, strict=True):
        if not any((other >= own).all() and (other > own).any() for other in points):
            kept.append(row)
    return kept


def best_row(rows: Sequence[Row], modes: Sequence[Mode]) -> Row | None:
    """The trial that is given out: on the Pareto front, the best by the first metric; of equals the first."""
    signs = 1.0 if modes[0] == "max" else -1.0
    return max(front(rows, modes), key=lambda row: (signs * (row.objective or [0.0])[0], -row.number), default=None)


def write_study(study: Study, kind: str, config: Mapping[str, Any], folder: Path, draw: bool = True) -> None:
    """Write everything into ``folder``.

    Args:
        study: the search.
        kind: of the stage that gives the best trial.
        config: its config, whole.
        folder: made here.
        draw: the figures as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    best = best_row(study.rows, study.modes)
    if study.segmented and best is not None:
        from workers.search_lineage import schedule_table

        (folder / "schedule.md").write_text(schedule_table(study.rows, best.number), encoding="utf-8")
    (folder / "best.yaml").write_text(_best_yaml(study, best, kind, config), encoding="utf-8")
    (folder / "best.json").write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
    shares = importance(study)
    (folder / "trials.json").write_text(json.dumps(_document(study, best, shares), indent=1), encoding="utf-8")
    (folder / "trials.csv").write_text(trials_csv(study), encoding="utf-8")
    (folder / "trials.md").write_text(trials_markdown(study), encoding="utf-8")
    from workers.search_figures import figures

    for name, image in (figures(study, shares) if draw else {}).items():
        (folder / f"{name}.png").write_bytes(image)


def _best_yaml(study: Study, best: Row | None, kind: str, config: Mapping[str, Any]) -> str:
    """The config block of the best trial, to be copied into a pipeline."""
    from ruamel.yaml import YAML

    stream = io.StringIO()
    writer = YAML()
    writer.default_flow_style = False
    writer.dump(json.loads(json.dumps({"kind": kind, "config": config})), stream)
    head = ""
    if best is not None:
        scores = ", ".join(
            f"{name} {value:.6g}" for name, value in zip(study.metrics, best.objective or (), strict=False)
        )
        head = f"# Trial {best.number} of {len(study.rows)}: {scores} ({study.selection}).\n"
    return head + stream.getvalue()


def _document(study: Study, best: Row | None, shares: Mapping[str, float] | None) -> dict[str, Any]:
    return {
        "stage": study.stage,
        "metrics": study.metrics,
        "modes": study.modes,
        "selection": study.selection,
        "algorithm": study.algorithm,
        "scheduler": study.scheduler,
        "seeds": study.seeds,
        "best": None if best is None else best.number,
        "front": [row.number for row in front(study.rows, study.modes)] if len(study.metrics) > 1 else None,
        "importance": shares,
        "trials": [_row(row) for row in study.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    kept = {**asdict(row), "values": dict(row.values)}
    if row.segment is None:
        del kept["segment"]
    return kept


def _table(study: Study) -> tuple[list[str], list[list[str]]]:
    names = list(study.space.dimensions) or sorted({name for row in study.rows for name in row.values})
    parts = ["member", "until", "parent"] if study.segmented else []
    spread = [] if study.seeds == 1 else ["std"]
    head = ["trial", *parts, "state", *study.metrics, *spread, *names, "from", "why"]
    lines = []
    for row in study.rows:
        scores = [f"{value:.6g}" for value in row.objective] if row.objective else [""] * len(study.metrics)
        spread = [] if study.seeds == 1 else [f"{np.std([run[0] for run in row.runs], ddof=1):.3g}" if row.runs else ""]
        points = [cell(row.values[name]) if name in row.values else "" for name in names]
        where = ["" if (row.segment or {}).get(part) is None else str((row.segment or {})[part]) for part in parts]
        lines.append([str(row.number), *where, row.state, *scores, *spread, *points, row.source, row.error])
    return head, lines


def named(name: str, names: Sequence[str]) -> str:
    """The last part of a path, where that is enough."""
    short = name.rpartition(".")[2]
    return short if [other.rpartition(".")[2] for other in names].count(short) == 1 else name


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def trials_csv(study: Study) -> str:
    """The table, trial by trial."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head, lines = _table(study)
    writer.writerow(head)
    writer.writerows(lines)
    return stream.getvalue()


def trials_markdown(study: Study) -> str:
    """The table, best first; what did not come to its end, and then what failed, below."""
    head, lines = _table(study)
    sign = -1.0 if study.modes[0] == "max" else 1.0
    rank = {
        row.number: (not row.whole, sign * row.objective[0]) if row.objective else (True, math.inf)
        for row in study.rows
    }
    lines.sort(key=lambda line: (rank[int(line[0])], int(line[0])))
    told = {"why": {""}, "from": {"search"}}  # columns that say nothing are left out
    used = [i for i, name in enumerate(head) if name not in told or {line[i] for line in lines} - told[name]]
    rows = [
        " | ".join(head[i] for i in used),
        " | ".join("---" for _ in used),
        *(" | ".join(line[i].replace("|", "/") for i in used) for line in lines),
    ]
    return "".join(f"| {row} |\n" for row in rows)


def importance(study: Study) -> dict[str, float] | None:
    """Share of the first objective's variance that each dimension explains (fANOVA); None when it cannot be told.

    Of segments it is the gain since the one before, as far as it differs from the mean gain over the same updates.

    Conditional dimensions count only if they are active in every trial (Optuna's rule).
    """
    done = study.done
    if len(done) < _FEWEST or len({row.objective[0] for row in done if row.objective}) < 2:
        return None
    try:
        import optuna
    except ImportError:
        return None
    judged = study_of(study.modes[:1])
    gains = _gains(study) if study.segmented else {row.number: row.objective[0] for row in done if row.objective}
    results = [(dict(row.values), [gains[row.number]]) for row in done]
    judged.add_trials(frozen_trials(study.space, results))
    shared = [
        name
        for name in study.space.order()
        if all(name in row.values for row in done) and len({identity(row.values[name]) for row in done}) > 1
    ]
    if len(shared) < 2:
        return {shared[0]: 1.0} if shared else None
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, max_depth=16, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(judged, evaluator=evaluator, params=shared)
    return {name: round(float(value), 6) for name, value in found.items()}


def _gains(study: Study) -> dict[int, float]:
    """What a segment added to the score that it went on from, minus what segments of its generation added."""
    scores = {row.number: row.objective[0] for row in study.done if row.objective}
    gains: dict[int, dict[int, float]] = {}
    for row in study.done:
        segment = row.segment or {}
        gain = scores[row.number] - scores.get(segment.get("parent", -1), 0.0)
        gains.setdefault(segment.get("generation", 0), {})[row.number] = gain
    return {number: gain - float(np.mean([*own.values()])) for own in gains.values() for number, gain in own.items()}
