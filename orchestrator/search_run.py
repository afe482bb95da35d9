"""Running a search: what is tried, what of it is in the store already, what came out, and which trial is given out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from moe.errors import Interrupted, RunFailed, SpecError, nearest
from orchestrator.blobs import write_atomic
from orchestrator.context import CodeChanged, MemberContext
from orchestrator.search_check import metric_value, numbers
from orchestrator.search_selection import check_selection, plain
from orchestrator.search_trial import Outcome, TrialMaker, found, known_points, run_trial, store_of
from orchestrator.stages.base import Member
from orchestrator.stages.search import KIND, SearchConfig
from orchestrator.store import Store
from workers.context import Context
from workers.search_lineage import schedule
from workers.search_population import Population, Schedule, Segments
from workers.search_propose import Fixed, Proposer, Tpe, finite, random_points, restarts, shown
from workers.search_report import Row, Study, best_row, write_study
from workers.search_space import OWN, SEED, Values

_ALWAYS_FAILS = 5
MOST_SEGMENTS = 1_000_000
STUDY = "search"


@dataclass
class Trial:
    """A trial as the search sees it.

    Attributes:
        number: from 0, in the order of proposal; trials of earlier searches come first.
        values: point of the space.
        asked: number by which the proposer knows it; None for one of an earlier search.
        row: what became of it; None while it is open.
        artifact: of its first run.
    """

    number: int
    values: Values
    asked: int | None
    row: Row | None = None
    artifact: str = ""


class Search:
    """The bookkeeping of one search; knows nothing of processes.

    Args:
        config: of the search.
        context: of its member.
    """

    def __init__(self, config: SearchConfig, context: MemberContext) -> None:
        self.config, self.context = config, context
        self.maker = TrialMaker(config, context.task)
        self.store: Store = store_of(context.task)
        self.space = config.searched()
        self.trials: list[Trial] = []
        self.reused = 0
        self._asked = 0
        self.proposer: Proposer = Fixed(iter(()))  # what earlier searches made is settled first
        self.proposer = self._begin()

    # ---- what to try -----------------------------------------------------------------------------------------------

    @property
    def segments(self) -> Segments | None:
        """What proposes the trials, if they are segments of longer runs."""
        return self.proposer if isinstance(self.proposer, Segments) else None

    @property
    def most(self) -> int:
        """Trials in all; of a population as far as is known yet."""
        if self.segments is not None:
            return self.segments.planned
        return self.config.trials or int(self.space.size())

    @property
    def limit(self) -> int:
        """What the number of trials never exceeds."""
        return self.most if self.segments is None else MOST_SEGMENTS

    def _begin(self) -> Proposer:
        config = self.config
        if config.algorithm == "grid":
            return Fixed(self.space.grid())
        if config.algorithm == "restarts":
            return Fixed(restarts(config.trials or 1))
        if config.algorithm == "schedule":
            return Schedule(config.schedule)
        seed = self.maker.seed(0) if config.sampler_seed is None else config.sampler_seed
        written = self.space.project(plain(config)) if config.include_written else None
        if config.population is not None:
            first = [] if written is None else [written]
            return Population(self.space, config.population, config.modes[0], seed, first)
        for values in self._known() if config.reuse else []:
            self._take_over(values)
        known = [trial.values for trial in self.trials]
        first = [written] if written is not None and written not in known else []
        if config.algorithm == "random":
            return Fixed(random_points(self.space, seed, first, known))
        results = [(t.values, t.row.objective) for t in self.trials if t.row is not None and t.row.objective]
        return Tpe(self.space, config.modes, seed, config.batch, config.startup, first, results)

    def _known(self) -> list[Values]:
        """Points that were there when this search first began: a resume must see the same ones."""
        path = self.context.scratch / "known.json"
        if not path.exists():
            write_atomic(path, json.dumps(known_points(self.maker, self.store)).encode())
        points: list[Values] = json.loads(path.read_text())
        return [values for values in points if self.space.contains(values)]

    def _take_over(self, values: Values) -> None:
        outcome = found(self.maker, self.store, values)
        if outcome is not None:
            trial = Trial(len(self.trials), values, None)
            self.trials.append(trial)
            self.settle(trial.number, outcome, "earlier")

    def next(self, look: bool = True) -> Trial | Literal["wait", "done"]:
        """The next trial that must be run. Trials whose artifacts are there are settled on the way.

        Args:
            look: settle what is in the store; otherwise it is given out as well.

        Raises:
            SpecError: no trial can succeed.
        """
        while len(self.trials) < self.limit:
            values = self.proposer.ask()
            if isinstance(values, str):
                return values
            trial = Trial(len(self.trials), values, self._asked)
            self._asked += 1
            self.trials.append(trial)
            outcome = self._same(trial) or (found(self.maker, self.store, values) if look else None)
            if outcome is None:
                return trial
            self.settle(trial.number, outcome, "store")
        return "done"

    def _same(self, trial: Trial) -> Outcome | None:
        """The result of an equal trial of this search."""
        for other in self.trials[: trial.number]:
            if other.row is not None and other.row.state == "done" and other.values == trial.values:
                return found(self.maker, self.store, trial.values)
        return None

    # ---- what came out ---------------------------------------------------------------------------------------------

    def settle(self, number: int, outcome: Outcome, source: str = "run") -> Row:
        """Take a trial's outcome.

        Raises:
            SpecError: the metric does not exist.
            RunFailed: the first trials have all failed.
            Interrupted: the trial was stopped because the search was.
            CodeChanged: the source files changed while the search was going on.
        """
        if outcome.state == "interrupted":
            raise Interrupted(f"{self.context.task.node} was asked to stop.", "Finished trials are kept.")
        if outcome.code_changed:
            raise CodeChanged(outcome.error, "Run `moepipe resume`: finished trials of the same code are kept.")
        trial = self.trials[number]
        state, error, objective, runs = outcome.state, outcome.error, None, []
        if state == "done":
            runs = [self._scores(digest) for digest in outcome.artifacts]
            objective = [sum(values) / len(values) for values in zip(*runs, strict=True)]
            trial.artifact = outcome.artifacts[0]
            if not finite(objective):
                state, error, objective = "failed", f"its objective is {', '.join(map(str, objective))}", None
        elif state == "stopped" and outcome.curve:
            runs = [[outcome.curve[-1][1]]]
        row = Row(
            number=number,
            values={name: value for name, value in trial.values.items() if name == SEED or not name.startswith(OWN)},
            state=state,
            objective=objective,
            runs=runs,
            error=error,
            source="earlier" if source == "earlier" else "search",
            artifacts=list(outcome.artifacts),
            curve=[list(point) for point in outcome.curve],
            steps=outcome.steps,
            segment=self._segment(trial, state),
        )
        trial.row = row
        if trial.asked is not None:
            self.proposer.tell(trial.asked, objective)
        self.reused += source != "run"
        self._tell(row, source)
        self._give_up()
        return row

    def _segment(self, trial: Trial, state: str) -> dict[str, Any] | None:
        """Say what a segment has made; the record of the segment."""
        if self.segments is None or trial.asked is None:
            return None
        if state == "done":
            meta = self.store.artifact(trial.artifact).meta
            self.segments.made(trial.asked, trial.artifact, int(meta.get("segment", {}).get("left", 0)))
        return self.segments.steps[trial.asked].record()

    def _scores(self, digest: str) -> list[float]:
        meta = self.store.artifact(digest).meta
        values = []
        for metric in self.config.metrics:
            value = metric_value(meta, metric)
            if value is None:
                names = [name for name, _ in numbers(meta)]
                raise SpecError(
                    f"No trial reports the metric {metric!r}: kind {self.config.stage.kind!r} has no such number.",
                    nearest(metric, names),
                )
            values.append(value)
        return values

    def _tell(self, row: Row, source: str) -> None:
        """One line, one point of the curve, one step of the bar."""
        rows = self.rows()
        best = best_row(rows, self.config.modes)
        said = {"done": _numbers(row.objective or []), "failed": f"failed: {row.error}"}.get(row.state, row.state)
        where = {"store": " (from the store)", "earlier": " (made earlier)"}.get(source, "")
        self.context.log(f"trial {row.number}: {said}{where}  {shown(row.values)}{_whose(row)}")
        values = {}
        if row.objective:
            values["trial/objective"] = row.objective[0]
        if best is not None and best.objective:
            values["best/objective"] = best.objective[0]
        if values:
            self.context.metrics(values, step=len(rows))
        short = {"best": values["best/objective"]} if "best/objective" in values else {}
        self.context.progress(len(rows), self.most, **short)

    def _give_up(self) -> None:
        rows = self.rows()
        if len(rows) >= min(_ALWAYS_FAILS, self.most) and all(row.state == "failed" for row in rows):
            raise RunFailed(
                f"All of the first {len(rows)} trials failed. Trial {rows[0].number}: {rows[0].error}",
                f"Their logs are in {Path(self.context.task.log).with_suffix('')}.",
            )

    def rows(self) -> list[Row]:
        """The settled trials, by number."""
        return [trial.row for trial in self.trials if trial.row is not None]

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Write the best trial's files and the study; return ``meta``.

        Raises:
            RunFailed: too few trials succeeded.
        """
        config, rows = self.config, self.rows()
        best = best_row(rows, config.modes)
        done = sum(row.state == "done" for row in rows)
        if best is None or not best.whole or done < config.min_trials:
            first = next((row for row in rows if row.state == "failed"), None)
            why = f" Trial {first.number} failed: {first.error}" if first else ""
            whole = "" if best is None or best.whole else " None of them came to the end of training."
            raise RunFailed(f"{done} of {len(rows)} trials succeeded, {config.min_trials} must.{whole}{why}")
        artifact = self.store.artifact(self.trials[best.number].artifact)
        copy_files(self.store.local_path(artifact), list(artifact.files), self.context.output)
        study = Study(
            stage=config.stage.kind,
            metrics=list(config.metrics),
            modes=list(config.modes),
            selection=config.selection,
            algorithm=config.algorithm,
            scheduler=config.scheduler,
            seeds=config.seeds,
            space=self.space,
            rows=rows,
        )
        write_study(study, *self._chosen(best), self.context.output / STUDY, config.figures)
        counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed", "stopped")}
        self.context.log(
            f"best: trial {best.number}, {_numbers(best.objective or [])}, {shown(best.values)}. {len(rows)} trials: "
            f"{self.reused} from the store, {len(rows) - self.reused} run now; {counts['failed']} failed, "
            f"{counts['stopped']} stopped early."
        )
        if self.segments is not None and self.segments.generation < 2:
            self.context.log("Training ended with the first segment, so nothing was changed: lower the interval.")
        if rows and self.reused == len(rows) and config.algorithm in ("random", "tpe") and self.space.dimensions:
            self.context.log("Every trial was there already: raise `trials` to try new points.")
        return {
            **artifact.meta,
            "search": {
                "metrics": study.metrics,
                "modes": study.modes,
                "selection": study.selection,
                "best": {
                    "trial": best.number,
                    "values": best.values,
                    "objective": best.objective,
                    **({} if best.segment is None else {"schedule": schedule(rows, best.number)}),
                },
                "trials": counts,
                "artifacts": sorted({digest for row in rows for digest in row.artifacts}),
            },
        }

    def _chosen(self, best: Row) -> tuple[str, dict[str, Any]]:
        """The stage that gives the best trial: the wrapped one, or a schedule of it."""
        config = self.config
        if best.segment is None:
            return config.stage.kind, config.point(best.values).model_dump(mode="json")
        parts = schedule(self.rows(), best.number)
        return KIND, {
            "stage": config.stage.model_dump(mode="json"),
            "metric": config.metric,
            "mode": config.mode,
            "selection": config.selection,
            "algorithm": "schedule",
            "schedule": [{"until": part["until"], "values": part["values"]} for part in parts],
        }


def run_search(config: SearchConfig, member: Member, context: Context) -> dict[str, Any]:
    """See :class:`orchestrator.stages.search.Stage`."""
    search = Search(config, cast(MemberContext, context))
    check_selection(config, context)
    if in_ray_worker():
        from orchestrator.executors.tune import run_on_tune

        run_on_tune(search)
    else:
        run_here_one_by_one(search)
    return search.finish()


def run_here_one_by_one(search: Search) -> None:
    """All trials in this process.

    Raises:
        SpecError: the search has a scheduler, which needs trials side by side.
    """
    if search.config.scheduler != "none":
        search.context.log(f"inline: no scheduler ({search.config.scheduler} needs Ray), every trial runs to its end")
    while not isinstance(trial := search.next(), str):
        outcome = run_trial(
            search.maker, trial.number, trial.values, lambda signal: None, stop=lambda: stopped(search.context)
        )
        search.settle(trial.number, outcome)
        search.context.check()


def stopped(context: Context) -> bool:
    """Whether the search was asked to stop."""
    try:
        context.check()
    except Interrupted:
        return True
    return False


def in_ray_worker() -> bool:
    """Whether this process was started by Ray (and not: whether it has started Ray)."""
    import sys

    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def copy_files(source: Path, names: Sequence[str], target: Path) -> None:
    """Copy an artifact's files (links where the file system has them: both are read-only)."""
    for name in names:
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            to.hardlink_to(source / name)
        except OSError:
            shutil.copyfile(source / name, to)


def _whose(row: Row) -> str:
    """Which part of which member's training a trial was."""
    if row.segment is None:
        return ""
    copied = f", from trial {row.segment['parent']}" if row.segment["copied"] else ""
    return f" (member {row.segment['member']} to update {row.segment['until']}{copied})"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
