"""The promotion gate: conditions declared in the pipeline, checked against a run's own comparison.

``candidate`` is what a deployment makes of a model, ``champion`` what has passed the gate. The gate reads the run
store; only then is the registry touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moe.errors import GateRefused, MoepipeError, NotFoundError, RunFailed, SpecError, nearest
from orchestrator.compare import AVERAGE, Comparison, Options, Row, compare, read_all
from orchestrator.compare_read import read_run
from orchestrator.compare_sources import Reader
from orchestrator.runs import Run
from orchestrator.spec import Condition, PromotionSpec
from orchestrator.store import Store
from orchestrator.tracking_state import CHAMPION

_COSTS = ("parameters", "active_parameters", "flops", "latency_ms")


@dataclass(frozen=True)
class Checked:
    """One condition and what was seen.

    Attributes:
        condition: in words.
        seen: in words.
        met: it holds.
    """

    condition: str
    seen: str
    met: bool


@dataclass(frozen=True)
class Model:
    """What is promoted.

    Attributes:
        name: in the registry.
        artifact: digest of the model.
        node: member that made it known.
        dataset: name of its data set.
    """

    name: str
    artifact: str
    node: str
    dataset: str


def model_of(run: Run, store: Store, promotion: PromotionSpec) -> Model:
    """The model of a run's first seed, and its name in the registry.

    Raises:
        RunFailed: the run has not finished.
        NotFoundError: it has no such stage.
        SpecError: nothing says what the model is called.
    """
    if run.status != "finished":
        raise RunFailed(f"Run {run.id} is {run.status}.", f"Only finished runs are promoted: moepipe resume {run.id}")
    facts = read_run(run)
    seed = run.spec().seeds[0]
    stages = [name for name, stage in facts.stages.items() if stage.kind == "deploy"]
    wanted = promotion.stage or (stages[0] if stages else None)
    if wanted is None:
        raise SpecError(
            "The gate does not say which model it is about.", "Add `stage:` to promotion, or a deploy stage."
        )
    if wanted not in facts.stages:
        raise NotFoundError(f"The run has no stage {wanted!r}.", nearest(wanted, facts.stages))
    node, made = next(((node, made) for node, made in facts.of_stage(wanted, seed)), ("", None))
    if made is None:
        raise NotFoundError(f"Stage {wanted} made nothing for seed {seed}.", f"moepipe show {run.id} {wanted}")
    meta = store.artifact(made.digest).meta
    deployed = facts.stages[wanted].kind == "deploy"
    name = promotion.model or ((meta.get("registry") or {}).get("name") if deployed else None)
    if not name:
        raise SpecError(
            "The model has no name in the registry.", "Set promotion.model, or register_as of the deploy stage."
        )
    return Model(str(name), str(meta["model"]) if deployed else made.digest, node, str(meta.get("dataset", "")))


def check(run: Run, store: Store, promotion: PromotionSpec, champion: Run | None) -> list[Checked]:
    """Every condition of the gate, with what was seen.

    Args:
        run: the candidate's run.
        store: of the runs.
        promotion: the gate.
        champion: run of the present champion; None when there is none.

    Raises:
        NotFoundError: the run has no results.
    """
    reader = Reader(store)
    found, _ = read_all(reader, [read_run(run)])
    plain = compare(found, Options(baseline=""))
    return [_one(condition, plain, found, reader, champion) for condition in promotion.conditions]


def _one(condition: Condition, plain: Comparison, found: list[Any], reader: Reader, champion: Run | None) -> Checked:
    words = _words(condition)
    try:
        row = _row(plain, condition.method)
        value = _value(row, condition.metric)
        seen, met = f"{value:.4g}", True
        if condition.at_least is not None:
            met = met and value >= condition.at_least
        if condition.at_most is not None:
            met = met and value <= condition.at_most
        if condition.baseline is not None:
            lead, told, significant = _lead(condition, value, found, reader, champion)
            seen += f", {told}"
            met = met and (lead is None or (lead >= condition.margin and (significant or not condition.significant)))
        return Checked(words, seen, met)
    except MoepipeError as error:
        return Checked(words, error.message, False)


def _lead(
    condition: Condition, value: float, found: list[Any], reader: Reader, champion: Run | None
) -> tuple[float | None, str, bool]:
    """Lead over the baseline (None: there is nobody to lead over), in words, and whether it is significant."""
    if condition.baseline != CHAMPION:
        tested = compare(found, Options(baseline=str(condition.baseline)))
        return _told(condition, _row(tested, condition.method), value, _row(tested, str(condition.baseline)))
    if champion is None:
        return None, "no champion yet", True
    theirs, _ = read_all(reader, [read_run(champion)])
    mine = [item for item in found if item.name == condition.method]
    other = [item for item in theirs if item.name == condition.method]
    if not other:
        raise NotFoundError(f"the champion's run {champion.id} has no row {condition.method!r}")
    if {(item.run, item.digest) for item in mine} == {(item.run, item.digest) for item in other}:
        return None, "it is the champion", True
    # Two runs may agree in all but the code; kept apart by name, so that they are never taken for seeds of one method.
    tested = compare([*_called(mine, "candidate"), *_called(other, CHAMPION)], Options(baseline=CHAMPION))
    return _told(condition, _row(tested, "candidate"), value, _row(tested, CHAMPION))


def _called(items: list[Any], name: str) -> list[Any]:
    return [replace(item, method=name, adaptation="", label=name) for item in items]


def _told(condition: Condition, row: Row, value: float, baseline: Row) -> tuple[float | None, str, bool]:
    other = _value(baseline, condition.metric)
    lead, significant = value - other, False
    told = f"{lead:+.4g} against {condition.baseline} ({other:.4g})"
    if row.difference is not None and condition.metric == AVERAGE:
        significant = bool(row.difference.mark) and row.difference.mean > 0
        if row.difference.corrected is not None:
            told += f", p = {row.difference.corrected:.3g}"
    return lead, told, significant


def _row(found: Comparison, method: str) -> Row:
    """The row of this name: exactly, or the only one that begins so (several selection rules)."""
    rows = [row for row in found.rows if row.id == method or row.observations[0].name == method]
    if not rows:
        names = {row.observations[0].name for row in found.rows}
        raise NotFoundError(f"the run has no row {method!r} ({', '.join(sorted(names))})")
    if len(rows) > 1:
        raise SpecError(f"{method!r} is {len(rows)} rows: {', '.join(row.id for row in rows)}")
    return rows[0]


def _value(row: Row, metric: str) -> float:
    if metric == "seeds":
        return float(len(row.seeds))
    value: float | None
    if metric in _COSTS:
        value = getattr(row.cost, metric)
    elif metric == "device_hours":
        value = row.hours.hours if row.hours else None
    else:
        cell = row.domain(metric) if metric in row.domains else row.cell(metric)
        value = cell.mean if cell else None
    if value is None:
        raise NotFoundError(f"{metric} of {row.id} was not recorded")
    return value


def _words(condition: Condition) -> str:
    parts = []
    if condition.at_least is not None:
        parts.append(f"at least {condition.at_least:g}")
    if condition.at_most is not None:
        parts.append(f"at most {condition.at_most:g}")
    if condition.baseline is not None:
        lead = f"{condition.margin:g} above" if condition.margin else "not below"
        parts.append(f"{lead} {condition.baseline}{', significantly' if condition.significant else ''}")
    return f"{condition.metric} of {condition.method}: {', '.join(parts)}"


def refuse(run: str, alias: str, checked: list[Checked]) -> None:
    """Raise GateRefused naming every condition that does not hold; nothing when all do."""
    failed = [item for item in checked if not item.met]
    if failed:
        lines = [f"{item.condition} (seen: {item.seen})" for item in failed]
        raise GateRefused(
            "\n  ".join(
                [f"Run {run} does not become {alias}: {len(failed)} of {len(checked)} conditions fail.", *lines]
            ),
            f"The numbers: moepipe compare {run}. Nothing was changed in the registry.",
        )
