"""A gang: the ranks of one shape under Ray Train, kept for one member after another.

A Ray Train job starts three generations of processes one after the other (controller, placement-group cleaner, ranks),
each with its imports: some 15 s before the first line of the training function. So the ranks stay when a member is
finished and ask for the next one; the members of a stage (seeds, sweeps) pay for the start once. A member that fails
ends its gang: what a failure leaves behind goes with the processes.

Train itself retries nothing: the scheduler's budgets are the only ones, and a retried member finds its checkpoints in
its scratch folder.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError

from moe.errors import Interrupted, MoepipeError
from orchestrator.context import TrainFunction, WorkerLostError, stop_flag
from orchestrator.executors.base import Cause, Task
from orchestrator.executors.ray_life import Beats
from orchestrator.executors.ray_log import SinkEmit, add_paths, captured, import_ahead
from orchestrator.reporting import TaskReporter
from orchestrator.spec import Resources
from orchestrator.store import Store

_OOM_WORDS = ("OutOfMemory", "running low on memory", "memory pressure", "oom-kill", "(OOM)")
_COLLATERAL = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
POLL_S = 0.1
PLACES_S = 10.0


class Desk:
    """Where members wait for the ranks of their gang, and ranks say that they are done. No Ray in here."""

    def __init__(self) -> None:
        self._members: dict[str, list[Any]] = {}
        self._done: dict[str, list[set[int]]] = {}
        self._places: dict[str, list[str]] = {}
        self._runners: dict[str, tuple[str, Any]] = {}
        self._doing: dict[str, str] = {}

    def post(self, gang: str, member: Any) -> int:
        """Leave the next member of ``gang``; its number counts from 0."""
        self._members.setdefault(gang, []).append(member)
        self._done.setdefault(gang, []).append(set())
        return len(self._members[gang]) - 1

    def take(self, gang: str, number: int) -> Any:
        """Member ``number`` of ``gang``, or None as long as there is none."""
        members = self._members.get(gang, [])
        return members[number] if number < len(members) else None

    def done(self, gang: str, number: int, rank: int) -> None:
        """``rank`` has finished member ``number``."""
        if gang in self._done:
            self._done[gang][number].add(rank)

    def placed(self, runner: str, group: str) -> None:
        """The ranks that the actor ``runner`` gathered sit in this placement group (both as hexadecimal ids)."""
        self._places.setdefault(runner, []).append(group)

    def places(self, runner: str | None = None) -> list[str]:
        """Placement groups of all gangs that ``runner`` gathered; None: that anybody did."""
        runners = list(self._places) if runner is None else [runner]
        return [group for name in runners for group in self._places.get(name, [])]

    def takes(self, work: str, runner: str, actor: Any) -> str | None:
        """Note that the actor ``runner`` does ``work`` now; gives the actor that did it before, if it was another.

        Args:
            work: any name.
            runner: hexadecimal id.
            actor: its handle, for :meth:`runner`.
        """
        before, _ = self._runners.get(work, (runner, None))
        self._runners[work] = runner, actor
        self._doing[runner] = work
        return before if before != runner else None

    def runner(self, work: str) -> tuple[str, Any]:
        """Id and handle of the actor that does ``work``; empty and None for one that took something else after it."""
        runner, actor = self._runners.get(work, ("", None))
        return (runner, actor) if self._doing.get(runner) == work else ("", None)

    def count(self, gang: str, number: int) -> int | None:
        """Ranks that have finished the member, or None for one that was never posted here (the desk was restarted)."""
        known = self._done.get(gang, [])
        return len(known[number]) if number < len(known) else None


class Gang:
    """The runner's side of a gang.

    Args:
        resources: the shape: how many ranks, and what each takes.
        folder: where Ray Train may write; all machines see it.
        sink: actor with the methods of :class:`Desk`.
        paths: folders that the driver can import from.
        modules: what the ranks import before they ask for their first member.
    """

    def __init__(
        self, resources: Resources, folder: Path, sink: Any, paths: Sequence[str], modules: Sequence[str] = ()
    ) -> None:
        self._name = uuid.uuid4().hex
        self._ranks = resources.workers
        self._sink = sink
        self._error: BaseException | None = None
        runner = ray.get_runtime_context().get_actor_id() or ""
        payload = {"gang": self._name, "runner": runner, "sink": sink, "paths": list(paths), "modules": list(modules)}
        self._trainer = _trainer(resources, folder, payload)
        self._thread = threading.Thread(target=self._fit, name="gang", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # it is raised again in the thread that waits for the member
            self._error = error

    @property
    def alive(self) -> bool:
        """Whether the ranks can take another member."""
        return self._thread.is_alive()

    def run(self, function: TrainFunction, config: Mapping[str, Any], task: Task) -> None:
        """Run ``function(config)`` on every rank and wait.

        Raises:
            WorkerLostError: a rank died.
            Exception: what a rank raised.
        """
        member = {"module": function.__module__, "name": function.__qualname__, "config": dict(config), "task": task}
        number = ray.get(self._sink.post.remote(self._name, member))
        while self.alive:
            with suppress(RayError):
                count = ray.get(self._sink.count.remote(self._name, number))
                if count is None:
                    raise WorkerLostError("infrastructure", "the actor that hands out members was restarted")
                if count == self._ranks:
                    return
            self._thread.join(POLL_S)
        error = self._error
        if error is None:
            raise WorkerLostError("infrastructure", "the ranks ended before their member")
        raise train_error(error, getattr(error, "worker_failures", {})) from None


def free_places(sink: Any, runner: str | None = None) -> None:
    """Give back what the ended actor ``runner`` held for its ranks; None: what all did whom this sink knows.

    Ray Train leaves this to an actor of its own, which finds nothing when several Rays live on one machine.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with suppress(RayError):
        for group in ray.get(sink.places.remote(runner), timeout=PLACES_S):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _trainer(resources: Resources, folder: Path, payload: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    per_rank = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0.0) * 1e9}
    wanted = {name: amount for name, amount in {**per_rank, **resources.custom}.items() if amount > 0}
    return TorchTrainer(
        run_rank,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=wanted or {"CPU": 0}
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def run_rank(payload: dict[str, Any]) -> None:
    """The function of every rank under Ray Train: one member after another, until the processes are ended."""
    import ray.train
    from ray.util.placement_group import get_current_placement_group

    add_paths(payload["paths"])
    gang, sink, rank = payload["gang"], payload["sink"], ray.train.get_context().get_world_rank()
    group = get_current_placement_group()
    if rank == 0 and group is not None:  # before the imports, which take seconds: who is ended meanwhile leaks it
        ray.get(sink.placed.remote(payload["runner"], group.id.hex()))
    import_ahead(payload["modules"])
    number = 0
    while True:
        member = ray.get(sink.take.remote(gang, number))
        if member is None:
            time.sleep(POLL_S)
            continue
        _run_member(member, sink, rank)
        ray.get(sink.done.remote(gang, number, rank))
        number += 1


def _run_member(member: Mapping[str, Any], sink: Any, rank: int) -> None:
    task: Task = member["task"]
    target: Any = importlib.import_module(member["module"])
    for name in member["name"].split("."):
        target = getattr(target, name)
    os.environ["OMP_NUM_THREADS"] = str(task.resources.threads)
    sys.modules["torch"].set_num_threads(task.resources.threads)  # type: ignore[attr-defined]
    config = dict(member["config"])
    if rank == 0:
        # The local folder of a store is the same on every machine (a folder of a shared file system).
        store = Store.open(task.store, None if "://" not in task.store else Path(task.cache).parent)
        flag = stop_flag(store, task.key.digest)
        config["reporter"] = TaskReporter(task.node, SinkEmit(sink), flag, Path(task.log))
    with captured(Path(task.log)), Beats(task, SinkEmit(sink), f"rank {rank}"):
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
