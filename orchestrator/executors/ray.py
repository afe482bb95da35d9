"""Runs members as Ray actors: an embedded Ray on this machine by default, or an existing cluster by its address.

An actor holds one shape of resources and is used again for members of that shape, so that a fan-out pays for imports
once per slot. In an embedded Ray the driver's ledger alone counts cores and memory, and actors hold only devices and
custom resources: so every stage uses the same warm processes. A gang's member runs in an actor that keeps its ranks, a
Ray Train job, for the next member of that shape; a gang of one is an ordinary member.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import EnvironmentProblem, InfeasibleError, RunFailed
from orchestrator import cluster_courier
from orchestrator.artifacts import quiet_remove
from orchestrator.capacity import Amounts, Capacity, machine_capacity, rank_demand
from orchestrator.cluster_growth import may_come
from orchestrator.executors.base import Deliver, Signal, Task
from orchestrator.executors.pool import Pool, Runner
from orchestrator.executors.ray_connection import Connection, amounts_of, connected
from orchestrator.executors.ray_life import LOOK_S, Lives, draining_nodes
from orchestrator.executors.ray_life import VARIABLE as STALL_VARIABLE
from orchestrator.spec import Resources

PENDING_S = 300.0
STUCK_S = 20.0  # longer than an actor takes to start
PENDING_GROWING_S = 1800.0  # a cloud takes minutes for a node, and longer when it has none
IDLE_GANG_S = 120.0
_ANSWER_S = 10.0
_PRESTARTED = 4


@dataclass
class _Job:
    """A task that is running. ``demand``: what it takes in all; ``leaving``: its node is told to go."""

    task: Task
    runner: Runner
    ref: Any
    demand: Amounts
    since: float
    seen: bool = False
    leaving: bool = False


class RayExecutor:
    """See :class:`orchestrator.executors.base.Executor`.

    Args:
        address: None: an embedded Ray, or the one that this process is connected to already. Otherwise ``auto``,
            ``host:port`` or ``ray://host:port``; the cluster must have moepipe installed and see the store's folder.
        num_cpus: cores of the embedded Ray; default all that this process may use.
        preload: modules that actors import ahead; an embedded Ray starts a few of them with itself.
        restarts: how often the embedded Ray is started again after it died.
    """

    def __init__(
        self,
        address: str | None = None,
        num_cpus: float | None = None,
        preload: tuple[str, ...] = ("torch", "torch._dynamo", "pandas"),
        restarts: int = 5,
    ) -> None:
        self._ray = Connection(address, num_cpus)
        self._num_cpus = num_cpus
        self._preload = preload
        self._restarts = restarts
        self._started = False
        self._pending_s = PENDING_S
        self._sink: Any = None
        self._answer: Any = None  # of the sink, while it is late
        self._pool = Pool(self._end_actor)
        self._jobs: dict[str, _Job] = {}
        self._lives = Lives()
        self._hosts: dict[Any, set[str]] = {}  # actor -> nodes of it and of its ranks
        self._leaving: set[str] = set()
        self._looked = self._deaf = time.monotonic()

    # ---- the connection --------------------------------------------------------------------------------------------

    def attach(self, stop: threading.Event) -> None:
        """See :class:`orchestrator.executors.base.Executor`. Ray starts with the first task that is not a hit."""

    def capacity(self) -> Capacity | None:
        """Of the cluster; of this machine while the embedded Ray has not been started."""
        if not self._started and self._ray.address is None and not connected():
            return machine_capacity(self._num_cpus)
        self.connect()
        import ray

        machines = []
        nodes = ray.nodes()
        for node in nodes:
            if node["Alive"] and node["NodeID"] not in self._leaving:
                machines.append(amounts_of(node["Resources"]))
        if self._ray.address is not None:
            # What is asked for there waits in Ray's queue, and that is what the autoscaler looks at.
            coming = may_come(nodes)
            self._pending_s = PENDING_S if not coming else PENDING_GROWING_S
            machines += [amounts_of(resources) for resources in coming]
        return Capacity(tuple(machines))

    def slots(self) -> int | None:
        """See :class:`orchestrator.executors.base.Executor`."""
        return None

    def connect(self) -> None:
        """Start the embedded Ray or join the cluster; the first task does it otherwise.

        Raises:
            EnvironmentProblem: it does not start, or nobody answers at the address.
        """
        if self._started:
            return
        self._ray.open()
        from orchestrator.executors.ray_actors import RemoteSink

        self._sink, self._answer = RemoteSink.remote(), None  # type: ignore[attr-defined]
        self._started = True
        if self._ray.embedded and self._preload:
            for _ in range(min(_PRESTARTED, self._ray.cores)):
                self._pool.give(Runner(self._new_actor({}), {}))

    def _recover(self, deliver: Deliver) -> None:
        """Report what was running as lost, and forget the dead Ray; the next task starts a new one."""
        jobs, self._jobs, self._sink, self._answer = list(self._jobs.values()), {}, None, None
        self._pool.clear(end=False)
        self._lives, self._hosts = Lives(), {}
        self._started = False
        self._ray.forget()
        if self._restarts == 0:
            raise EnvironmentProblem(
                "The embedded Ray died again and again.",
                "Look at its memory use (`moepipe doctor`), then `moepipe resume`.",
            )
        self._restarts -= 1
        for job in jobs:
            error = RunFailed(f"{job.task.node}: the embedded Ray died (its raylet was killed) and is started again.")
            deliver(Signal(job.task.node, "failed", {}, "infrastructure", error))

    # ---- tasks -----------------------------------------------------------------------------------------------------

    def start(self, task: Task) -> None:
        """See :class:`orchestrator.executors.base.Executor`."""
        self.connect()
        flag = _flag(task)
        quiet_remove(flag)
        cluster_courier.forget_stop(task)
        copies = task.resources.workers * task.slots
        demand = {name: amount * copies for name, amount in rank_demand(task.resources).items()}
        gang = task.gang and task.resources.workers > 1 and not task.leads
        # Ranks of a gang and trials of a search take their share from Ray themselves, even where the ledger counts for
        # the rest.
        holds = demand if gang or task.leads else self._held(demand)
        runner = None if task.leads else self._pool.take(holds, gang)
        if runner is None and (gang or task.leads) and (plain := self._pool.take({})):
            runner = Runner(plain.actor, holds, gang)
        if task.gang or task.leads or runner is None:
            self._pool.make_room(holds, [job.runner.holds for job in self._jobs.values()], self.capacity())
        runner = runner or Runner(self._new_actor({} if gang or task.leads else holds), holds, gang)
        ref = runner.actor.run.remote(task, self._sink)
        self._jobs[task.node] = _Job(task, runner, ref, demand, time.monotonic())

    def expect(self, resources: Resources, modules: Sequence[str]) -> None:
        """See :class:`orchestrator.executors.base.Executor`. In an embedded Ray the ranks of a gang start meanwhile.

        On a cluster they would hold what others need.
        """
        runners = [*self._pool.idle, *(job.runner for job in self._jobs.values())]
        leads = any(job.task.leads for job in self._jobs.values())  # its trials need what the ranks would hold
        if not self._ray.embedded or resources.workers == 1 or leads or any(runner.gang for runner in runners):
            return
        import ray

        holds = {name: amount * resources.workers for name, amount in rank_demand(resources).items()}
        runner = Runner(self._new_actor({}, preload=()), holds, gang=True)
        folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "train"
        runner.actor.gather.remote(resources, folder, self._sink, modules)
        self._pool.give(runner)

    def _held(self, demand: Amounts) -> Amounts:
        """What an actor takes from Ray for a demand."""
        counted_here = ("cpus", "memory_gb") if self._ray.embedded else ()
        return {name: amount for name, amount in demand.items() if name not in counted_here}

    def _new_actor(self, holds: Mapping[str, float], preload: Sequence[str] | None = None) -> Any:
        """An actor that holds ``holds`` and first imports ``preload`` (None: the executor's own)."""
        from orchestrator.executors.ray_actors import RemoteRunner

        paths = [os.path.abspath(path or os.curdir) for path in sys.path] if self._ray.address is None else []
        options: dict[str, Any] = {
            "num_cpus": holds.get("cpus", 0),
            "num_gpus": holds.get("gpus", 0),
            "resources": {name: amount for name, amount in holds.items() if name not in ("cpus", "gpus", "memory_gb")},
        }
        if "memory_gb" in holds:
            options["memory"] = int(holds["memory_gb"] * 1e9)
        return RemoteRunner.options(**options).remote(paths, self._preload if preload is None else preload)  # type: ignore[attr-defined]

    def _end_actor(self, runner: Runner) -> None:
        import ray

        self._hosts.pop(runner.actor, None)
        with suppress(ray.exceptions.RayError):
            ray.kill(runner.actor)
        if runner.gang:
            from orchestrator.executors.gang import free_places

            free_places(self._sink, runner.actor._actor_id.hex())

    def cancel(self, node: str, kill: bool = False) -> None:
        """See :class:`orchestrator.executors.base.Executor`. The flag lies beside the member's scratch folder."""
        job = self._jobs.get(node)
        if job is None:
            return
        if kill:
            self._end_actor(job.runner)
        else:
            flag = _flag(job.task)
            flag.parent.mkdir(parents=True, exist_ok=True)
            flag.touch()
            cluster_courier.ask_to_stop(job.task)

    # ---- what comes back -------------------------------------------------------------------------------------------

    def poll(self, timeout: float, deliver: Deliver) -> None:
        """See :class:`orchestrator.executors.base.Executor`."""
        if self._ray.dead():
            self._recover(deliver)
            return
        if not self._jobs:
            self._deaf = time.monotonic()
            time.sleep(timeout)
            return
        import ray

        refs = {job.ref: job for job in self._jobs.values()}
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=timeout)
        if ready and len(refs) > 1:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        if self._ray.dead():
            self._recover(deliver)
            return
        self._drain(deliver)
        self._watch_drains()
        for ref in ready:
            job = refs[ref]
            del self._jobs[job.task.node]
            deliver(self._collect(job))
        self._watch_pending(deliver)
        self._watch_silent(deliver)
        self._pool.end_idle_gangs(IDLE_GANG_S)

    def _drain(self, deliver: Deliver) -> None:
        import ray

        # An answer that is late is asked for again: the sink gives out every word once.
        self._answer = self._answer or self._sink.drain.remote()
        try:
            signals = ray.get(self._answer, timeout=_ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            self._replace_sink()
            return
        except ray.exceptions.RayError:
            self._answer = None
            self._replace_sink()
            return  # the sink is being restarted; only words are lost
        self._answer = None
        self._deaf = time.monotonic()
        for signal in signals:
            job = self._jobs.get(signal.node)
            if job is not None:
                job.seen = True
            if signal.kind != "beat":
                deliver(signal)
            elif job is not None and signal.data["attempt"] == job.task.attempt:
                self._lives.take(signal)
                self._hosts.setdefault(job.runner.actor, set()).add(signal.data["host"])
        self._lives.listen()

    def _replace_sink(self) -> None:
        """A sink that stands still is killed; Ray starts another one."""
        import ray

        if self._lives.stall_s and time.monotonic() - self._deaf > self._lives.stall_s:
            self._deaf = time.monotonic()
            with suppress(ray.exceptions.RayError):
                ray.kill(self._sink, no_restart=False)

    def _watch_silent(self, deliver: Deliver) -> None:
        """Members with a process that stands still are lost like those whose process died."""
        for node, words in self._lives.silent().items():
            job = self._jobs.pop(node, None)
            self._lives.forget(node)
            if job is not None:
                self._end_actor(job.runner)
                error = RunFailed(
                    f"{node}: {words} and counts as lost.",
                    f"{STALL_VARIABLE} says how long a silence may be (0: for ever); its log is {job.task.log}.",
                )
                deliver(Signal(node, "failed", {}, "infrastructure", error))

    def _watch_drains(self) -> None:
        """Members on nodes that were told to go are asked to stop at their next checkpoint; idle actors there end."""
        now = time.monotonic()
        if self._ray.address is None or now - self._looked < LOOK_S:
            return
        self._looked = now
        self._leaving = draining_nodes()
        if not self._leaving:
            return
        for node, job in self._jobs.items():
            if not job.leaving and self._lives.hosts(node) & self._leaving:
                job.leaving = True
                self.cancel(node)
        self._pool.end_where(lambda runner: bool(self._hosts.get(runner.actor, set()) & self._leaving))

    def _collect(self, job: _Job) -> Signal:
        """The result of a task whose reference is ready."""
        import ray

        self._lives.forget(job.task.node)

        from orchestrator.executors.gang import ray_cause

        try:
            signal: Signal = ray.get(job.ref)
        except ray.exceptions.RayError as error:
            cause = "preemption" if job.leaving else ray_cause(error)
            what = {"out_of_memory": "ran out of memory", "preemption": "was preempted"}.get(cause, "died")
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self._end_actor(job.runner)
            return Signal(
                job.task.node,
                "failed",
                {},
                cause,
                RunFailed(f"{job.task.node}: its worker process {what} ({said})", f"Its log is {job.task.log}."),
            )
        if signal.kind == "finished":
            self._pool.give(Runner(job.runner.actor, {}) if job.task.leads else job.runner)
        else:
            self._end_actor(job.runner)  # whatever state the failure left behind goes with it
            if job.leaving and signal.cause in ("interrupted", "infrastructure"):
                told = RunFailed(f"{job.task.node}: its node is about to go; it was stopped at a checkpoint or ended.")
                return Signal(job.task.node, "failed", {}, "preemption", told)
        return signal

    def _make_room_for(self, job: _Job) -> None:
        """End idle actors that hold what a waiting task asks for: Ray put them where the ledger saw room for it."""
        wanted = set(job.runner.holds)
        if any(wanted & set(runner.holds) for runner in self._pool.idle):
            busy = [other.runner.holds for other in self._jobs.values() if other.seen]
            self._pool.make_room(job.runner.holds, busy, self.capacity())

    def _watch_pending(self, deliver: Deliver) -> None:
        """A task that finds no place for long is an error that names what it asks for, not a silent wait."""
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if not job.seen and now - job.since > STUCK_S:
                self._make_room_for(job)
            if not job.seen and now - job.since > self._pending_s:
                del self._jobs[job.task.node]
                self._end_actor(job.runner)
                asked = ", ".join(f"{amount:g} {name}" for name, amount in job.demand.items())
                error = InfeasibleError(
                    f"{job.task.node} found no place for {self._pending_s:g} s; it asks for {asked or 'nothing'}.",
                    "Look at what else runs on the cluster (`ray status`), or lower the stage's resources.",
                )
                deliver(Signal(job.task.node, "failed", {}, "user", error))

    def close(self) -> None:
        """See :class:`orchestrator.executors.base.Executor`. A Ray that was there before stays."""
        if not self._started:
            return
        import ray

        for job in self._jobs.values():
            self._end_actor(job.runner)
        self._pool.clear()
        with suppress(ray.exceptions.RayError):
            ray.kill(self._sink)
        self._jobs, self._started = {}, False
        self._ray.close()


def _flag(task: Task) -> Path:
    return Path(task.cache) / "scratch" / f"{task.key.digest}.stop"
