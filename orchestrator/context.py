"""Running one member: the context that its stage sees, and everything around the call of ``Stage.run``.

The process that runs a member also commits its result, so large files are hashed where they lie and the driver never
touches them. While it works it holds the key's ``member`` lock: an orphan of a driver that was killed can never write
the same scratch folder as its successor, and two runs never make the same artifact at once.
"""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from moe.errors import EnvironmentProblem, Interrupted, MoepipeError, RunFailed
from orchestrator.artifacts import Artifact, canonical_json, disk_problem
from orchestrator.cluster_courier import Courier
from orchestrator.codedigest import code_digests
from orchestrator.executors.base import Cause, Signal, Task
from orchestrator.policies import classify
from orchestrator.reporting import Emit, TaskReporter
from orchestrator.stages.base import STAGES, Member, StageBase
from orchestrator.store import Store
from orchestrator.system_metrics import SystemMetrics
from workers.context import Input

_LOCK_S = 0.2
TrainFunction = Callable[[dict[str, Any]], None]


class Launcher(Protocol):
    """How ``context.train`` runs a function on the ranks of a gang."""

    def __call__(self, function: TrainFunction, config: dict[str, Any], task: Task, reporter: TaskReporter) -> None:
        """Run and wait; raise what a rank raised."""
        ...


class WorkerLostError(Exception):
    """A process that ran a part of the member died; the scheduler retries it.

    Args:
        cause: what it is charged to.
        message: for people.
    """

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(cause, message)
        self.cause = cause


class CodeChanged(RunFailed):
    """The source files changed (or differ on this machine) since the run computed its keys."""

    code = "code-changed"


def run_here(function: TrainFunction, config: dict[str, Any], task: Task, reporter: TaskReporter) -> None:
    """Launcher of world size 1: a call in this process; says so where more ranks are asked for."""
    if task.resources.workers > 1:
        reporter.log(f"resources.workers={task.resources.workers} has no effect here: one rank does all of the work")
    function({**config, "reporter": reporter})


@dataclass
class MemberContext:
    """See :class:`workers.context.Context`."""

    run: str
    member: str
    seed: int
    threads: int
    inputs: Mapping[str, Sequence[Input]]
    left_out: Mapping[str, Sequence[str]]
    output: Path
    scratch: Path
    data_root: Path
    reporter: TaskReporter
    task: Task
    launcher: Launcher

    def progress(self, done: int, total: int, **values: float) -> None:
        """See :class:`workers.context.Reporter`."""
        self.reporter.progress(done, total, **values)

    def log(self, message: str) -> None:
        """See :class:`workers.context.Reporter`."""
        self.reporter.log(message)

    def check(self) -> None:
        """See :class:`workers.context.Reporter`."""
        self.reporter.check()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """See :class:`workers.context.Context`."""
        self.reporter.metrics(values, step)

    def train(self, function: TrainFunction, config: dict[str, Any]) -> None:
        """See :class:`workers.context.Context`.

        Raises:
            RunFailed: the stage is not declared as a gang, or ``config`` is not plain JSON.
        """
        if not self.task.gang:
            raise RunFailed(f"Stage kind {self.task.kind!r} calls context.train but is not a gang.", "Set gang = True.")
        canonical_json(config)
        self.launcher(function, config, self.task, self.reporter)


@lru_cache(maxsize=8)
def _store(url: str, cache: str) -> Store:
    # A remote store's local folder ends with a name made from the URL; its parent is what was configured.
    return Store.open(url, None if "://" not in url else Path(cache).parent)


def stop_flag(store: Store, key: str) -> Path:
    """The file that asks the member with this key to stop."""
    return store.folder / "scratch" / f"{key}.stop"


def _set_threads(threads: int) -> None:
    """For libraries that are loaded later, and for torch when it is loaded already. Torch is not imported here."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _check_code(task: Task, stage: StageBase[Any], config: Any) -> None:
    """The key says which code makes the result; running other code would poison the cache."""
    now = code_digests([task.module, *stage.code(config)])
    keyed = {name.removeprefix("code."): value for name, value in task.key.parts.items() if name.startswith("code.")}
    changed = sorted(name for name in {*now, *keyed} if now.get(name) != keyed.get(name))
    if changed:
        raise CodeChanged(
            f"{', '.join(changed[:3])} changed while the run was going on, or differs on this machine.",
            "Run `moepipe resume`: what is finished is kept, and the rest gets new keys.",
        )


_SOUND: dict[str, tuple[tuple[str, int, int], ...]] = {}


def _sound(store: Store, digest: str, member: str) -> Artifact:
    """An artifact whose bytes are those of its digest: nobody computes from damaged ones. Hashed once per process.

    A damaged one is removed, so that the next start of the pipeline finds a miss and makes it again.
    """
    artifact = store.artifact(digest)
    folder = store.local_path(artifact)
    files = [(name, folder / name) for name in sorted(artifact.files)]
    if all(path.is_file() for _, path in files):
        marks = tuple((name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files)
        if _SOUND.get(digest) == marks:
            return artifact
        problems = store.verify(artifact)
        if not problems:
            _SOUND[digest] = marks
            return artifact
    else:
        problems = [f"file {next(name for name, path in files if not path.is_file())} is missing"]
    store.remove(digest)
    raise EnvironmentProblem(
        f"Artifact {digest[:12]} of {member} is damaged in the store: {problems[0]}. It was removed.",
        "`moepipe resume` makes it again. Check the disk.",
    )


def _produce(task: Task, store: Store, launcher: Launcher, reporter: TaskReporter) -> Artifact:
    """Import the stage, run it and commit its output."""
    for kind, module in task.kinds.items():  # those that the driver added by hand are unknown here
        STAGES.add(kind, module)
    stage: StageBase[Any] = importlib.import_module(task.module).Stage()
    member = Member(task.member, task.params, task.weight)
    config = stage.narrow(type(stage).Config.model_validate(task.config), member)
    _check_code(task, stage, config)
    inputs: dict[str, list[Input]] = {}
    for port, refs in task.inputs.items():
        inputs[port] = []
        for ref in refs:
            artifact = _sound(store, ref.digest, ref.member)
            inputs[port].append(Input(ref.member, ref.digest, store.local_path(artifact), artifact.meta))
    _set_threads(task.resources.threads)
    output = store.staging()
    scratch = store.scratch(task.key)
    try:
        context = MemberContext(
            run=task.run,
            member=task.member_path,
            seed=task.seed,
            threads=task.resources.threads,
            inputs=inputs,
            left_out=task.left_out,
            output=output,
            scratch=scratch,
            data_root=Path(task.data_root),
            reporter=reporter,
            task=task,
            launcher=launcher,
        )
        start = time.monotonic()
        meta = dict(stage.run(config, member, context))
        if task.left_out:
            meta["left_out"] = {port: list(names) for port, names in task.left_out.items()}
        return store.commit(output, task.output, meta, task.key, task.node, round(time.monotonic() - start, 3))
    finally:
        shutil.rmtree(output, ignore_errors=True)


@contextmanager
def _member_lock(store: Store, task: Task, reporter: TaskReporter) -> Iterator[None]:
    """Hold the key's ``member`` lock; while another process has it, a stop still gets through."""
    told = False
    while (lock := store.try_lock(task.key, "member")) is None:
        if not told:
            reporter.log("waits for a process of an earlier attempt, or of another run, that works on the same key")
            told = True
        reporter.check()
        time.sleep(_LOCK_S)
    try:
        yield
    finally:
        lock.release()


def run_member(task: Task, emit: Emit, launcher: Launcher = run_here, stop: Callable[[], bool] | None = None) -> Signal:
    """Run one member to its committed artifact, or to the error that says why not. Never raises.

    Args:
        task: what to run.
        emit: takes signals to the scheduler.
        launcher: how ``context.train`` runs its function.
        stop: answers whether this process was asked to stop.
    """
    store = _store(task.store, task.cache)
    log = Path(task.log)
    reporter = TaskReporter(task.node, emit, stop_flag(store, task.key.digest), log, stop)
    emit(Signal(task.node, "started", {"attempt": task.attempt, "pid": os.getpid(), "host": socket.gethostname()}))
    start = time.monotonic()
    try:
        with _member_lock(store, task, reporter), SystemMetrics(reporter.samples), Courier(store, task) as courier:
            made = store.lookup(task.key)
            artifact = made or _produce(task, store, launcher, reporter)
            store.drop_scratch(task.key)
            courier.finished = True
        reporter.flush()
        seconds = round(time.monotonic() - start, 3)
        data = {"digest": artifact.digest, "seconds": seconds, "reused": made is not None, "bytes": artifact.bytes}
        return Signal(task.node, "finished", data)
    except BaseException as error:
        reporter.flush()
        return _failure(task, log, error)


def _failure(task: Task, log: Path, error: BaseException) -> Signal:
    """The full traceback goes into the member's log, one sentence to the user."""
    text = "".join(traceback.format_exception(error))
    if log.parent.is_dir():
        with log.open("a", encoding="utf-8") as stream:
            stream.write(text)
    if isinstance(error, WorkerLostError):
        return Signal(task.node, "failed", {}, error.cause, RunFailed(f"{task.node}: {error.args[1]}"))
    cause = classify(error)
    return Signal(task.node, "failed", {}, cause, readable(error, task.node, log))


def readable(error: BaseException, node: str, log: Path) -> MoepipeError:
    """``error`` as something that can be shown and that crosses processes."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"{node} was interrupted.", "Its state up to the last checkpoint is kept.")
    if isinstance(error, OSError) and (problem := disk_problem(error, node)):
        return problem
    if isinstance(error, MoepipeError):
        try:
            pickle.loads(pickle.dumps(error))  # our own object, made a line above
            return error
        except Exception:
            return RunFailed(error.message, error.hint)
    lines = str(error).strip().splitlines()
    last = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return RunFailed(f"{node} failed: {last}.", f"The full traceback is in {log}.")
