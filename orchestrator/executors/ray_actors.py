"""What runs inside Ray: the actor that runs members, and the sink that carries their words home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from orchestrator.context import TrainFunction, run_here, run_member
from orchestrator.executors.base import Signal, Task
from orchestrator.executors.gang import Desk, Gang
from orchestrator.executors.ray_life import Beats
from orchestrator.executors.ray_log import SinkEmit, add_paths, captured, import_ahead
from orchestrator.reporting import TaskReporter
from orchestrator.spec import Resources


class Sink(Desk):
    """Keeps signals until the driver fetches them, and members until their gang does.

    Losing it loses words and makes gangs start anew, never results.
    """

    def __init__(self) -> None:
        super().__init__()
        self._signals: list[Signal] = []

    def push(self, signals: list[Signal]) -> None:
        """Take signals of one process, in order."""
        self._signals += signals

    def drain(self) -> list[Signal]:
        """Give out everything once."""
        signals, self._signals = self._signals, []
        return signals


class MemberRunner:
    """The actor that runs members, one at a time; it holds the resources of its shape as long as it lives."""

    def __init__(self, paths: Sequence[str], preload: Sequence[str] = ()) -> None:
        self._paths = list(paths)
        self._gang: Gang | None = None
        add_paths(self._paths)
        import_ahead(preload)

    def gather(self, resources: Resources, folder: Path, sink: Any, modules: Sequence[str]) -> None:
        """Start the ranks of a gang ahead of its first member."""
        self._gang = Gang(resources, folder, sink, self._paths, modules)

    def run(self, task: Task, sink: Any) -> Signal:
        """See :func:`orchestrator.context.run_member`."""
        emit = SinkEmit(sink)

        def launch(function: TrainFunction, config: dict[str, Any], task: Task, reporter: TaskReporter) -> None:
            if task.resources.workers == 1:
                run_here(function, config, task, reporter)
                return
            reporter.flush()
            if self._gang is None or not self._gang.alive:
                store = Path(task.cache) if task.cache else Path(task.store)
                self._gang = Gang(task.resources, store / "scratch" / f"{task.key.digest}.train", sink, self._paths)
            self._gang.run(function, config, task)

        Path(task.log).parent.mkdir(parents=True, exist_ok=True)
        with captured(Path(task.log)), Beats(task, emit, "its process"):
            result = run_member(task, emit, launch)
        emit.settle()
        return result


RemoteRunner: Callable[..., Any] = ray.remote(max_restarts=0, max_task_retries=0)(MemberRunner)
RemoteSink: Callable[..., Any] = ray.remote(num_cpus=0, max_restarts=-1)(Sink)
