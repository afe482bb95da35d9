"""What runs inside Ray: the actor that runs members, the sink that carries their words home, the launch of a gang."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError

from moe.errors import Interrupted, MoepipeError
from orchestrator.context import TrainFunction, WorkerLostError, run_here, run_member, stop_flag
from orchestrator.executors.base import Cause, Signal, Task
from orchestrator.reporting import TaskReporter
from orchestrator.store import Store

_OOM_WORDS = ("OutOfMemory", "running low on memory", "memory pressure", "oom-kill", "(OOM)")
_COLLATERAL = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")


def add_paths(paths: Sequence[str]) -> None:
    """Make modules importable that the driver can import (its script's folder, pytest's root, ...)."""
    sys.path.extend(path for path in paths if path not in sys.path)


class Sink:
    """Keeps signals until the driver fetches them. Losing it loses words, never results."""

    def __init__(self) -> None:
        self._signals: list[Signal] = []

    def push(self, signals: list[Signal]) -> None:
        """Take signals of one process, in order."""
        self._signals += signals

    def drain(self) -> list[Signal]:
        """Give out everything once."""
        signals, self._signals = self._signals, []
        return signals


class SinkEmit:
    """An ``emit`` that pickles: sends to the sink and does not wait."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._last: Any = None

    def __call__(self, signal: Signal) -> None:
        """Send one signal."""
        with suppress(RayError):
            self._last = self._sink.push.remote([signal])

    def settle(self) -> None:
        """Wait until the last signal has arrived, so that the result does not overtake it."""
        if self._last is not None:
            with suppress(RayError):
                ray.get(self._last, timeout=10)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SinkEmit, (self._sink,))


@contextmanager
def captured(path: Path) -> Iterator[None]:
    """Everything this process writes goes into the member's log: prints, logging, and what C++ libraries say.

    On a machine that does not see the folder, it stays in Ray's own log of the worker.
    """
    if not path.parent.is_dir():
        yield
        return
    with path.open("a", encoding="utf-8", buffering=1) as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        saved = os.dup(1), os.dup(2)
        root = logging.getLogger()
        root.addHandler(handler)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with redirect_stdout(log), redirect_stderr(log):
                yield
        finally:
            root.removeHandler(handler)
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)


class MemberRunner:
    """The actor that runs members, one at a time; it holds the resources of its shape as long as it lives."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        add_paths(self._paths)

    def run(self, task: Task, sink: Any) -> Signal:
        """See :func:`orchestrator.context.run_member`."""
        emit = SinkEmit(sink)

        def launch(function: TrainFunction, config: dict[str, Any], task: Task, reporter: TaskReporter) -> None:
            if task.resources.workers == 1:
                run_here(function, config, task, reporter)
                return
            reporter.flush()
            train(function, config, task, sink, self._paths)

        Path(task.log).parent.mkdir(parents=True, exist_ok=True)
        with captured(Path(task.log)):
            result = run_member(task, emit, launch)
        emit.settle()
        return result


def train(function: TrainFunction, config: dict[str, Any], task: Task, sink: Any, paths: Sequence[str]) -> None:
    """Run ``function(config)`` on the ranks of a gang by Ray Train and wait.

    Train itself retries nothing: the scheduler's budgets are the only ones, and a retried member finds its
    checkpoints in its scratch folder.

    Raises:
        WorkerLostError: a rank died.
        Exception: what a rank raised.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    resources = task.resources
    per_rank = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0.0) * 1e9}
    wanted = {name: amount for name, amount in {**per_rank, **resources.custom}.items() if amount > 0}
    store = Path(task.cache) if task.cache else Path(task.store)
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={
            "module": function.__module__,
            "name": function.__qualname__,
            "config": config,
            "task": task,
            "sink": sink,
            "paths": list(paths),
        },
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=wanted or {"CPU": 0}
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(store / "scratch" / f"{task.key.digest}.train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise train_error(error, getattr(error, "worker_failures", {})) from None


def run_rank(payload: dict[str, Any]) -> None:
    """The function of every rank under Ray Train: find the function and call it."""
    import ray.train

    add_paths(payload["paths"])
    task: Task = payload["task"]
    target: Any = importlib.import_module(payload["module"])
    for name in payload["name"].split("."):
        target = getattr(target, name)
    os.environ["OMP_NUM_THREADS"] = str(task.resources.threads)
    sys.modules["torch"].set_num_threads(task.resources.threads)  # type: ignore[attr-defined]
    config = dict(payload["config"])
    if ray.train.get_context().get_world_rank() == 0:
        # The local folder of a store is the same on every machine (a folder of a shared file system).
        store = Store.open(task.store, None if "://" not in task.store else Path(task.cache).parent)
        flag = stop_flag(store, task.key.digest)
        config["reporter"] = TaskReporter(task.node, SinkEmit(payload["sink"]), flag, Path(task.log))
    with captured(Path(task.log)):
        target(config)
        if "reporter" in config:
            config["reporter"].flush()


def train_error(error: BaseException, failures: Mapping[int, Any]) -> BaseException:
    """The one error of a gang that explains the others. A rank that died comes first: the rest die of it."""
    raised: list[BaseException] = []
    for failure in failures.values():
        # Ray Train wraps what a rank raised, and a failed health check wraps the death of its actor.
        inner = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", None) or failure
        inner = getattr(inner, "cause", None) or inner
        if isinstance(inner, RayError) and not isinstance(inner, MoepipeError):
            cause = ray_cause(inner)
            if isinstance(inner, RayActorError | NodeDiedError | OutOfMemoryError):
                return WorkerLostError(cause, f"a rank died ({_first_line(inner)})")
        raised.append(inner)
    if not raised:
        return WorkerLostError("infrastructure", f"the training job failed ({_first_line(error)})")
    for kind in (Interrupted, MoepipeError, MemoryError):
        for inner in raised:
            if isinstance(inner, kind):
                return inner
    own = [inner for inner in raised if not any(word in str(inner) for word in _COLLATERAL)]
    if own:
        return own[0]
    return WorkerLostError("infrastructure", f"the ranks lost each other ({_first_line(raised[0])})")


def ray_cause(error: BaseException) -> Cause:
    """What a failure of Ray itself is charged to."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or any(words in text for words in _OOM_WORDS):
        return "out_of_memory"
    if getattr(error, "preempted", False) or "preempt" in text.lower():
        return "preemption"
    return "infrastructure"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


RemoteRunner: Callable[..., Any] = ray.remote(max_restarts=0, max_task_retries=0)(MemberRunner)
RemoteSink: Callable[..., Any] = ray.remote(num_cpus=0, max_restarts=-1)(Sink)
