"""Trials of a search on Ray Tune: the driver's side. What runs in a trial's process is in ``tune_trial.py``.

Tune keeps no state of its own: what is finished is an artifact, what was cut off goes on from its checkpoint in the
store's scratch folder. So nothing is restored: a search that starts again asks for the same points and finds them. The
number of trials at once comes from the resources that the scheduler gave to the search, never from Tune's own guess.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from moe.errors import InfeasibleError, Interrupted, MoepipeError, RunFailed, SpecError
from orchestrator.capacity import rank_demand
from orchestrator.context import stop_flag
from orchestrator.executors.gang import free_places
from orchestrator.executors.tune_trial import OUTCOME, SCORE, STEP, Work, perform
from orchestrator.executors.tune_watch import TrialLives
from orchestrator.search_run import Search, Trial, stopped
from orchestrator.search_trial import Outcome
from orchestrator.spec import Resources
from orchestrator.stages.base import STAGES
from orchestrator.stages.search import SearchConfig

PENDING_S = 300.0
_LOOK_S = 0.5
_MOST_UPDATES = 10**7
_TOLD = 12
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1e9",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Tune wants every trial to take something; a byte of memory keeps no rank from its core.
_ALMOST_NOTHING = {"memory": 1.0}
_QUIET = ("ray.tune", "ray.train", "ray.air")


def run_on_tune(search: Search) -> None:
    """Run a search to its last trial.

    Raises:
        Interrupted: the search was asked to stop.
        InfeasibleError: no trial found a place for five minutes; the message names what is missing.
        MoepipeError: what the search itself refuses, see :meth:`orchestrator.search_run.Search.settle`.
    """
    conductor = Conductor(search)
    if conductor.ahead is None:  # everything was in the store
        return
    os.environ.update(_SETTINGS)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(conductor.slots)
    _share_processes()
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    task, config = search.context.task, search.config
    folder = search.context.scratch / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    sink = _sink()
    lives = TrialLives(sink, task.stall_s, search.context.log)
    conductor.ended = lives.ended
    work = Work(
        maker=search.maker,
        module=STAGES.module_name(config.stage.kind),
        paths=tuple(sys.path),
        stop=str(conductor.stop),
        curve=curve_name(config),
        gate=str(conductor.gate),
        sink=sink,
    )

    def trial(point: dict[str, Any]) -> None:
        perform(work, point)

    tuner = tune.Tuner(
        tune.with_resources(trial, request(task.resources, task.gang)),
        tune_config=tune.TuneConfig(
            search_alg=_Points(conductor),
            scheduler=make_scheduler(config, conductor.slots),
            num_samples=search.limit + 1,
            reuse_actors=True,
            trial_name_creator=lambda made: f"trial_{made.config['number']}",
            trial_dirname_creator=lambda made: f"trial_{made.config['number']}_{made.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=task.retry.infrastructure),
            callbacks=[_Watch(conductor, lives)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception as error:
        if conductor.problem is None:
            raise RunFailed(f"{task.node}: Ray Tune stopped with {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if task.gang:
            free_places(sink)  # Tune has ended the trials' processes, not what they held for their ranks
        with suppress(RayError):
            ray.kill(sink)
    if conductor.problem is not None:
        raise conductor.problem


def _share_processes() -> None:
    """Let trials run in the worker processes that Ray has started ahead.

    Tune gives its actors an environment of their own (variables for libraries that are not used here), for which Ray
    starts new processes: several seconds each on a busy machine.
    """
    with suppress(ImportError, AttributeError):  # another version of Tune starts more slowly, that is all
        from ray.tune.execution import class_cache

        class_cache.DEFAULT_ENV_VARS.clear()
        class_cache.ENV_VARS_TO_PROPAGATE = set()


def _sink() -> Any:
    from orchestrator.executors.ray_actors import RemoteSink

    return RemoteSink.remote()  # type: ignore[attr-defined]


def request(resources: Resources, gang: bool) -> tune.PlacementGroupFactory:
    """What a trial's process takes from Ray. The ranks of a gang take their share themselves."""
    if gang and resources.workers > 1:
        return tune.PlacementGroupFactory([_ALMOST_NOTHING])
    names = {"cpus": "CPU", "gpus": "GPU", "memory_gb": "memory"}
    demand = {
        names.get(name, name): amount * (1e9 if name == "memory_gb" else 1)
        for name, amount in rank_demand(resources).items()
    }
    return tune.PlacementGroupFactory([demand or _ALMOST_NOTHING])


def curve_name(config: SearchConfig) -> str | None:
    """What the scheduler looks at; None without one.

    Raises:
        SpecError: it must be named.
    """
    if config.scheduler == "none":
        return None
    if config.curve:
        return config.curve
    first, _, rest = config.metrics[0].partition(".")
    if first == "scores" and rest:
        return f"val/{rest}"
    raise SpecError(
        f"The scheduler {config.scheduler!r} needs a score that is reported while a trial runs.",
        "Write its name under `curve`, e.g. val/accuracy or loss.",
    )


def make_scheduler(config: SearchConfig, slots: int = 1) -> TrialScheduler:
    """Tune's scheduler for a search that keeps ``slots`` processes."""
    words = {"time_attr": STEP, "metric": SCORE, "mode": config.modes[0]}
    if config.scheduler == "asha":
        made = _warm(AsyncHyperBandScheduler)(
            **words, grace_period=config.grace, reduction_factor=config.reduction, max_t=_MOST_UPDATES
        )
    elif config.scheduler == "median":
        made = _warm(MedianStoppingRule)(**words, grace_period=config.grace, min_samples_required=3)
    else:
        made = _warm(FIFOScheduler)()
    made.slots = slots
    return made


def _warm(kind: type[TrialScheduler]) -> Any:
    """A scheduler of this kind that keeps every process of a trial for the next one.

    Tune keeps no more idle processes than trials wait at that moment, often one; then trials that are shorter than the
    start of a process run one after the other on the process that is left.
    """

    class Warm(kind):  # type: ignore[misc,valid-type]
        slots = 1
        told = False

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            """Called by Tune for every trial."""
            if not self.told:
                self.told = True
                with suppress(AttributeError):  # another version of Tune is slower, not wrong
                    controller._actor_cache.increase_max(trial.placement_group_factory, self.slots)
            super().on_trial_add(controller, trial)

    return Warm


class Conductor:
    """Between Tune and the search: which of Tune's trials is which of ours.

    Args:
        search: the search.

    Attributes:
        ahead: the next trial, already asked for; None at the end.
        problem: what ended the search.
        ended: called with the number of every trial that has ended, and whether its process died over it.
        stop: file that asks the trials' processes to stop.
        gate: folder where these processes wait for each other at the start.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.live: dict[str, Trial] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.problem: MoepipeError | None = None
        self.ended: Callable[[int, bool], None] = lambda trial, died: None
        self.stop: Path = search.context.scratch / "stop"
        self.stop.unlink(missing_ok=True)
        self.gate: Path = search.context.scratch / "gate"
        shutil.rmtree(self.gate, ignore_errors=True)
        self.gate.mkdir()
        self.slots = max(1, search.context.task.slots)
        self._look = search.config.scheduler == "none"
        first = search.next(self._look)
        self.ahead: Trial | None = None if isinstance(first, str) else first

    def __deepcopy__(self, memo: dict[int, Any]) -> Conductor:
        """Tune copies and pickles what it is given; there is one search."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, ())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A point for one of Tune's trials, None: later, or Tune's word for the end."""
        if self.problem is not None:
            return str(Searcher.FINISHED)
        if len(self.live) >= self.slots:
            return None
        trial: Any = self.ahead
        self.ahead = None
        if trial is None:
            try:
                trial = self.search.next(self._look)
            except MoepipeError as error:
                self.give_up(error)
                return str(Searcher.FINISHED)
        if trial == "wait":
            return None
        if trial == "done":
            return str(Searcher.FINISHED)
        self.live[trial_id] = trial
        (self.gate / "expected").write_text(str(len(self.live)))
        return {"number": trial.number, "values": dict(trial.values)}

    def report(self, trial_id: str, result: dict[str, Any]) -> None:
        """A score of a running trial."""
        if SCORE in result and OUTCOME not in result:
            self.curves.setdefault(trial_id, []).append((int(result[STEP]), float(result[SCORE])))

    def complete(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        """A trial has ended, in one of three ways: by itself, by the scheduler, or because its process died."""
        trial = self.live.pop(trial_id, None)
        if trial is None:
            return
        self.ended(trial.number, error)
        curve = tuple(self.curves.pop(trial_id, ()))
        if result is not None and OUTCOME in result:
            outcome = Outcome(**{**json.loads(result[OUTCOME]), "curve": curve})
        elif error:
            deaths = self.search.context.task.retry.infrastructure + 1
            times = "once" if deaths == 1 else f"{deaths} times"
            outcome = Outcome("failed", error=f"its process died {times}", curve=curve)
        else:
            outcome = Outcome("stopped", curve=curve, steps=curve[-1][0] if curve else None)
        try:
            self.search.settle(trial.number, outcome, "store" if outcome.reused else "run")
            if outcome.state == "done" and outcome.blind is not None:
                self._no_curve(outcome.blind)
        except MoepipeError as problem:
            self.give_up(problem)

    def _no_curve(self, reported: Sequence[str]) -> None:
        """A scheduler that never sees a score would let every trial run to its end. Raises SpecError."""
        config = self.search.config
        known = f" It reports {', '.join(reported[:_TOLD])}." if reported else ""
        raise SpecError(
            f"The scheduler {config.scheduler!r} looks at {curve_name(config)!r}, which no trial reports while it runs."
            + known,
            "Set `curve` to one of these, or scheduler: none." if reported else "Set scheduler: none.",
        )

    def give_up(self, problem: MoepipeError) -> None:
        """End the search: nothing new starts, running trials stop at their next checkpoint."""
        self.problem = self.problem or problem
        self.stop.touch()
        task = self.search.context.task
        if task.gang and task.resources.workers > 1:  # ranks know nothing of the file
            for trial in self.live.values():
                stop_flag(self.search.store, self.search.maker.key(trial.values, 0).digest).touch()


class _Points(Searcher):  # type: ignore[misc]
    """See :class:`Conductor`."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(metric=SCORE, mode=conductor.search.config.modes[0])
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        return self._conductor.suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._conductor.report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._conductor.complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store remembers."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the store remembers."""


class _Watch(tune.Callback):  # type: ignore[misc]
    """Looks twice a second whether the search was asked to stop, whether its trials live and find a place."""

    def __init__(self, conductor: Conductor, lives: TrialLives | None) -> None:
        self._conductor, self._lives = conductor, lives
        self._next = 0.0
        self._pending_since: float | None = None

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        """Called by Tune after each of its steps."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOOK_S
        conductor = self._conductor
        context = conductor.search.context
        if self._lives is not None:
            self._lives.look()
        if conductor.problem is None and stopped(context):
            conductor.give_up(Interrupted(f"{context.task.node} was asked to stop.", "Finished trials are kept."))
        waiting = any(trial.status == "PENDING" for trial in trials)
        if not waiting or any(trial.status == "RUNNING" for trial in trials):
            self._pending_since = None
            return
        self._pending_since = self._pending_since or now
        if now - self._pending_since > PENDING_S:
            conductor.problem = conductor.problem or InfeasibleError(
                f"{context.task.node}: no trial found a place for {PENDING_S:g} s; {missing(context.task.resources)}.",
                "Look at what else runs on the cluster (`ray status`), or lower the stage's resources.",
            )
            raise conductor.problem


def missing(resources: Resources) -> str:
    """Which amounts that a trial asks for are not free, in words."""
    names = {"cpus": "CPU", "gpus": "GPU", "memory_gb": "memory"}
    free = ray.available_resources()
    lacking = []
    for name, amount in rank_demand(resources).items():
        there = free.get(names.get(name, name), 0.0) / (1e9 if name == "memory_gb" else 1)
        if there < amount * resources.workers:
            lacking.append(f"{amount * resources.workers:g} {name} (free: {there:g})")
    return f"it asks for {', '.join(lacking)}" if lacking else "what it asks for is free, but not on one machine"
