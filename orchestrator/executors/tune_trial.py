"""What runs in the process of a Tune trial: one point of the space after the other, watched by the scheduler."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.blobs import write_atomic
from orchestrator.context import TrainFunction, run_here
from orchestrator.executors.base import Signal, Task
from orchestrator.executors.gang import Gang, free_places
from orchestrator.executors.ray_life import Beats
from orchestrator.executors.ray_log import SinkEmit, add_paths, captured
from orchestrator.reporting import TaskReporter
from orchestrator.search_trial import TrialMaker, found, run_trial, store_of
from orchestrator.stages.base import STAGES
from workers.search_space import Values

OUTCOME, SCORE, STEP = "outcome", "score", "step"
_MEETING_S = 20.0
_gangs: dict[str, Gang] = {}


@dataclass(frozen=True)
class Work:
    """All that a trial's process must know besides its point.

    Attributes:
        maker: of the search.
        module: of the wrapped stage.
        paths: folders that the driver can import from.
        stop: file that asks for a stop.
        curve: what the scheduler looks at; None without one.
        gate: folder where the processes wait for each other at the start.
        sink: actor that hears the signs of life of trials and ranks, and knows who does which trial.
    """

    maker: TrialMaker
    module: str
    paths: tuple[str, ...]
    stop: str
    curve: str | None
    gate: str
    sink: Any


def perform(work: Work, point: Mapping[str, Any]) -> None:
    """Run one trial and report its outcome to Tune."""
    os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))  # Tune moves into a folder of its own
    add_paths(work.paths)
    STAGES.add(work.maker.config.stage.kind, work.module)
    number, values = int(point["number"]), dict(point["values"])
    store = store_of(work.maker.task)
    reused = found(work.maker, store, values) is not None
    task = work.maker.make(number, values)
    log = Path(task.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    _begin(work.sink, number)
    _meet(Path(work.gate))
    watch = Watch(work, values)
    watch.replay()
    with captured(log), Beats(task, SinkEmit(work.sink), "its process"):
        outcome = run_trial(work.maker, number, values, watch, _launcher(work), Path(work.stop).exists)
    if watch.ended is not None:
        raise watch.ended
    blind = sorted(watch.others) if work.curve is not None and not (watch.points or reused) else None
    told = {**asdict(outcome), "curve": (), "reused": reused, "blind": blind}
    last: dict[str, Any] = {OUTCOME: json.dumps(told)}
    if watch.points and outcome.state == "done":
        step, score = watch.points[-1]
        last |= {STEP: step + 1, SCORE: score}
    tune.report(last)


def _begin(sink: Any, number: int) -> None:
    """Say who does the trial, and free what the ranks of a process held that died over it: its own want the place."""
    here = ray.get_runtime_context()
    dead = ray.get(sink.takes.remote(str(number), here.get_actor_id() or "", here.current_actor))
    if dead is not None:
        free_places(sink, dead)


def _meet(gate: Path) -> None:
    """Wait until the other processes of the search are there, once, and not for long.

    A trial that ends before another one's process is there makes Tune hand it this process and drop the other one.
    """
    mark = gate / str(os.getpid())
    if mark.exists() or not gate.is_dir():
        return
    mark.touch()
    end = time.monotonic() + _MEETING_S
    while time.monotonic() < end:
        with suppress(OSError, ValueError):
            if len(list(gate.iterdir())) - 1 >= int((gate / "expected").read_text()):
                return
        time.sleep(0.05)


def _launcher(work: Work) -> Any:
    """As in :class:`orchestrator.executors.ray_actors.MemberRunner`: ranks stay for the next trial."""

    def launch(function: TrainFunction, config: dict[str, Any], task: Task, reporter: TaskReporter) -> None:
        if task.resources.workers == 1:
            run_here(function, config, task, reporter)
            return
        gang = _gangs.get(work.stop)
        if gang is None or not gang.alive:
            folder = Path(task.cache or task.store) / "scratch" / f"{task.key.digest}.train"
            gang = _gangs[work.stop] = Gang(task.resources, folder, work.sink, work.paths)
        gang.run(function, config, task)

    return launch


class Watch:
    """The ``emit`` of a trial: hands scores to Tune, and keeps them beside the trial's checkpoints.

    A search that starts again shows the scheduler the scores of finished and stopped trials from there.
    """

    def __init__(self, work: Work, values: Values) -> None:
        self._name = work.curve
        self._path = Path()
        self.points: list[tuple[int, float]] = []
        self.others: set[str] = set()
        self.ended: SystemExit | None = None
        if work.curve is not None:
            store, key = store_of(work.maker.task), work.maker.key(values, 0).digest
            self._path = store.folder / "scratch" / f"{key}.curve"

    def replay(self) -> None:
        """Show the scheduler what is known of this trial."""
        if self._name is None:
            return
        with suppress(FileNotFoundError, ValueError):
            for step, score in json.loads(self._path.read_bytes()):
                self.points.append((int(step), float(score)))
        for step, score in self.points:
            tune.report({STEP: step, SCORE: score})

    def __call__(self, signal: Signal) -> None:
        """Take a signal of the stage. Tune answers a score with SystemExit when the trial is to stop."""
        if self._name is None or signal.kind not in ("progress", "metrics"):
            return
        values = signal.data["values"]
        self.others.update(values)
        step = signal.data.get("done") if signal.kind == "progress" else signal.data.get("step")
        if self._name not in values or step is None or (self.points and step <= self.points[-1][0]):
            return
        self.points.append((int(step), float(values[self._name])))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(self.points).encode())
        try:
            tune.report({STEP: int(step), SCORE: self.points[-1][1]})
        except SystemExit as end:
            self.ended = end
            raise
