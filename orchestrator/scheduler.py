"""The loop that runs a graph: ready nodes, longest first, go to the executor while the ledger allows.

No Ray here. The driver computes keys, looks results up, holds one ``flight`` lock per running key (so that a second run
waits and then hits), decides about failures and appends events. Results are committed by the process that made them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe.errors import InfeasibleError, MoepipeError, RunFailed
from orchestrator.admission import Admission
from orchestrator.cache import KeyMaker
from orchestrator.capacity import rank_demand
from orchestrator.cluster_claims import Releases
from orchestrator.executors.base import Cause, Executor, Signal
from orchestrator.frontier import Frontier, Inputs
from orchestrator.graph import Graph
from orchestrator.outcome import Failure, Outcome
from orchestrator.policies import Decision, RetryPolicy, backoff_s
from orchestrator.runs import Run, Status
from orchestrator.store import Key, Store
from orchestrator.stragglers import Stragglers
from orchestrator.tasks import Place, make_task
from orchestrator.telling import Listener, Teller
from orchestrator.weighing import Ranks

POLL_S = 0.25
_BUSY_S = 0.5


@dataclass
class _Flight:
    """A node that the executor has."""

    lock: Releases
    key: Key
    started: float | None = None
    timed_out: bool = False


def execute(
    graph: Graph,
    store: Store,
    run: Run,
    executor: Executor,
    listeners: Sequence[Listener] = (),
    data_root: str | Path = "",
    stop: threading.Event | None = None,
    kill: threading.Event | None = None,
) -> Outcome:
    """Run a graph to its end and close the executor.

    Args:
        graph: what to run.
        store: where results are found and kept.
        run: the record; its lock is held meanwhile.
        executor: inline or Ray.
        listeners: called with every event after it was recorded; one that raises is dropped.
        data_root: folder with prepared data sets.
        stop: set it to stop gracefully: nothing new is started, members stop at their next checkpoint.
        kill: set it to end the members at once.

    Raises:
        BusyError: another process works on this run.
        InfeasibleError: a node asks for more than there is.
        EnvironmentProblem: the run record cannot be written; the run can be resumed.
    """
    with run.lock():
        loop = _Loop(
            graph, store, run, executor, list(listeners), Path(data_root).absolute(), stop or threading.Event()
        )
        try:
            return loop.run_to_end(kill or threading.Event())
        except InfeasibleError as error:
            loop.teller.notify(
                run.finish("failed", loop.frontier.artifacts, hits=loop.hits, failures={"": error.message})
            )
            raise
        finally:
            loop.release_all()
            executor.close()


@dataclass
class _Loop:
    graph: Graph
    store: Store
    run: Run
    executor: Executor
    listeners: list[Listener]
    data_root: Path
    stop: threading.Event
    frontier: Frontier = field(init=False)
    stopping: bool = False
    hits: int = 0
    ready: list[str] = field(default_factory=list)
    later: dict[str, float] = field(default_factory=dict)
    flights: dict[str, _Flight] = field(default_factory=dict)
    inputs: dict[str, Inputs] = field(default_factory=dict)
    policies: dict[str, RetryPolicy] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    announced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.frontier = Frontier(self.graph)
        self.keys = KeyMaker(self.data_root)
        self.room = Admission(self.graph, self.executor.capacity)
        self.teller = Teller(self.run, self.listeners)
        self.rank = Ranks(self.graph, self.store)
        self.stragglers = Stragglers()
        self.order = {name: index for index, name in enumerate(self.graph.nodes)}

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run_to_end(self, kill: threading.Event) -> Outcome:
        """See :func:`execute`."""
        self.executor.attach(self.stop)
        self.keys.read_code(self.graph.nodes.values())
        self.teller.tell("run-started", pid=os.getpid(), host=socket.gethostname(), nodes=len(self.graph.nodes))
        self.decide(self.frontier.sources())
        while not kill.is_set():
            if self.stop.is_set() and not self.stopping:
                self.begin_stop()
            if not self.stopping:
                self.launch()
            if not self.flights and (self.stopping or not (self.ready or self.later)):
                break
            try:
                self.executor.poll(POLL_S if self.flights else min(POLL_S, self.wait_s()), self.deliver)
            except KeyboardInterrupt:
                if self.stop.is_set():
                    kill.set()
                self.stop.set()
            self.watch_time()
            self.room.watch(not (self.flights or self.later or self.stopping) and bool(self.ready), self.ready)
        return self.end()

    def end(self) -> Outcome:
        """Write the end of the record."""
        if self.frontier.settled < len(self.graph.nodes):
            status: Status = "interrupted"
        else:
            status = "finished" if self.frontier.succeeded() else "failed"
        self.release_all()
        outcome = Outcome(status, dict(self.frontier.artifacts), dict(self.failures), self.hits)
        told = {name: failure.error.message for name, failure in list(self.failures.items())[:100]}
        self.teller.notify(self.run.finish(status, outcome.artifacts, hits=self.hits, failures=told))
        return outcome

    def begin_stop(self) -> None:
        """Start nothing more and ask what runs to stop."""
        self.stopping = True
        for name in self.flights:
            self.executor.cancel(name)

    def wait_s(self) -> float:
        """Seconds until a delayed node is due."""
        return max(0.0, min(self.later.values(), default=0.0) - time.monotonic())

    # ---- deciding --------------------------------------------------------------------------------------------------

    def decide(self, names: Sequence[str]) -> None:
        """Nodes whose parents are settled: hit, skipped, or ready to run. Walks on through hits."""
        todo = deque(names)
        while todo:
            name = todo.popleft()
            inputs = self.frontier.inputs(name)
            if inputs.missing:
                todo += self.skip(name, inputs.missing)
                continue
            self.inputs[name] = inputs
            if (digest := self.look_up(name)) is not None:
                todo += self.settle(name, digest)
            elif name not in self.failures:
                self.rank.arrive(name, inputs)
                self.ready.append(name)
                self.announce(name)
        self.ready.sort(key=lambda name: (-self.rank[name], self.order[name]))

    def key(self, name: str) -> Key:
        """The key of a node whose inputs have arrived."""
        return self.keys.key(self.graph.nodes[name], self.inputs[name].digests, self.inputs[name].left_out)

    def look_up(self, name: str) -> str | None:
        """Digest of the stored result of a node, told as a hit."""
        try:
            key = self.key(name)
            artifact = self.store.lookup(key)
        except MoepipeError as error:
            self.fail(name, Decision("fail", "user", 1, 0, error.message), error)
            return None
        if artifact is None:
            return None
        self.hits += 1
        self.teller.tell("member-hit", name, digest=artifact.digest, key=key.digest, bytes=artifact.bytes)
        return artifact.digest

    def settle(self, name: str, digest: str | None) -> list[str]:
        """A node is done with; forget what was kept for it."""
        for kept in (self.inputs, self.policies, self.attempts):
            kept.pop(name, None)  # type: ignore[attr-defined]
        return self.frontier.settle(name, digest)

    def skip(self, name: str, reason: str) -> list[str]:
        """A node that cannot run because of what failed before it."""
        error = RunFailed(f"{name} was skipped: it {reason}.")
        self.failures[name] = Failure(name, "upstream", error, "")
        self.teller.skipped(name, error)
        return self.settle(name, None)

    # ---- starting --------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Hand ready nodes to the executor while there is room."""
        now = time.monotonic()
        due = [name for name, when in self.later.items() if when <= now]
        for name in due:
            del self.later[name]
        if due:
            self.decide(due)
        slots = self.executor.slots()
        if self.ready:
            self.room.open(self.unmade())
            self.room.new_round()
        left: list[str] = []
        for index, name in enumerate(self.ready):
            if slots is not None and len(self.flights) >= slots:
                left += self.ready[index:]
                break
            if not self.room.take(name) or not self.start(name):
                left.append(name)
        self.ready = [name for name in left if name not in self.later]

    def unmade(self) -> Iterator[str]:
        """Nodes that have no artifact yet."""
        return (name for name in self.graph.nodes if name not in self.frontier.artifacts)

    def start(self, name: str) -> bool:
        """Start a node whose resources are taken; False when another run is making the same artifact."""
        node = self.graph.nodes[name]
        key = self.key(name)
        lock = self.store.try_lock(key)
        if lock is None:
            self.room.give_back(name)
            if name not in self.announced:
                self.announced.add(name)
                self.teller.tell("member-log", name, message="waits for another run that is making the same artifact")
            self.later[name] = time.monotonic() + _BUSY_S
            return False
        self.flights[name] = _Flight(lock, key)
        self.attempts[name] = self.attempts.get(name, 0) + 1
        place = Place(self.store, self.run, str(self.data_root))
        slots = self.room.slots(name)
        self.executor.start(make_task(self.graph, node, key, self.inputs[name], self.attempts[name], place, slots))
        self.announce(name)
        return True

    def announce(self, name: str) -> None:
        """Tell the executor about gangs that wait for nothing but ``name`` and others that are ready or run."""
        nodes, stages = self.graph.nodes, self.graph.stages
        # Few nodes are gangs; only for those is it worth looking at everything that is ready.
        kinds = {child: stages[nodes[child].stage].stage for child in self.graph.children[name]}
        gangs = [child for child, stage in kinds.items() if stage.gang and not stage.leads]
        if not gangs:
            return
        busy = {*self.flights, *self.ready}
        for child in gangs:
            if self.frontier.waits_only_for(busy, child):
                self.executor.expect(nodes[child].resources, stages[nodes[child].stage].stage.modules)

    # ---- what comes back -------------------------------------------------------------------------------------------

    def deliver(self, signal: Signal) -> None:
        """Take what the executor says. Words of nodes that are not in flight come too late and do not count."""
        name, flight = signal.node, self.flights.get(signal.node)
        if flight is None:
            return
        if signal.kind == "finished":
            self.land(name)
            self.teller.tell("member-finished", name, key=flight.key.digest, **signal.data)
            node = self.graph.nodes[name]
            if not signal.data.get("reused"):
                self.stragglers.finished(node.stage, node.member.weight, signal.data.get("seconds", 0.0))
            self.decide(self.settle(name, signal.data["digest"]))
        elif signal.kind == "failed":
            self.land(name)
            error = signal.error or RunFailed(f"{name} failed.")
            self.failed(name, flight, signal.cause or "infrastructure", error)
        elif signal.kind == "started":
            flight.started = flight.started or time.monotonic()
            demand = rank_demand(self.graph.nodes[name].resources)
            self.teller.tell("member-started", name, resources=demand, key=flight.key.digest, **signal.data)
        elif signal.kind == "progress":
            self.teller.tell("member-progress", name, **signal.data)
        elif signal.kind == "metrics":
            self.teller.tell("member-metrics", name, **signal.data)
        else:
            self.teller.tell("member-log", name, **signal.data)

    def failed(self, name: str, flight: _Flight, cause: Cause, error: MoepipeError) -> None:
        """Decide about a failure."""
        node = self.graph.nodes[name]
        if flight.timed_out:
            cause = "timeout"
            error = RunFailed(
                f"{name} took longer than its timeout_s of {node.timeout_s:g} s and was stopped.",
                "Raise timeout_s; `moepipe resume` goes on from its last checkpoint.",
            )
        elif self.stopping and cause != "user":
            cause = "interrupted"
        policy = self.policies.setdefault(name, RetryPolicy(node.retry))
        decision = policy.decide(cause, error.message)
        if decision.action == "stop":
            self.stop.set()
            self.teller.failure(name, decision, error)
        elif decision.action == "retry":
            self.teller.failure(name, decision, error)
            self.later[name] = time.monotonic() + backoff_s(decision.count)
            self.room.refresh()
        else:
            self.fail(name, decision, error)

    def fail(self, name: str, decision: Decision, error: MoepipeError) -> None:
        """A node has failed for good."""
        self.failures[name] = Failure(name, decision.cause, error, str(self.run.log_path(name)))
        self.teller.failure(name, decision, error)
        self.decide(self.settle(name, None))

    def watch_time(self) -> None:
        """End members that are over their time, and tell about slow ones."""
        now = time.monotonic()
        for name, flight in self.flights.items():
            limit = self.graph.nodes[name].timeout_s
            if limit and flight.started and now - flight.started > limit and not flight.timed_out:
                flight.timed_out = True
                self.executor.cancel(name, kill=True)
        if self.stragglers.due():
            nodes = self.graph.nodes
            running = [
                (name, nodes[name].stage, nodes[name].member.weight, flight.started)
                for name, flight in self.flights.items()
                if flight.started is not None
            ]
            for name, words in self.stragglers.slow(running).items():
                self.teller.tell("member-log", name, message=words, warning=True)

    def land(self, name: str) -> None:
        """A node is no longer in flight."""
        self.flights.pop(name).lock.release()
        self.room.give_back(name)

    def release_all(self) -> None:
        """Let go of every lock."""
        for name in list(self.flights):
            self.land(name)
