"""The loop that runs a graph: ready nodes, longest first, go to the executor while the ledger allows.

No Ray here. The driver computes keys, looks results up, holds one ``flight`` lock per running key (so that a second run
waits and then hits), decides about failures and appends events. Results are committed by the process that made them.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from moe.errors import MoepipeError, RunFailed
from orchestrator.cache import KeyMaker
from orchestrator.capacity import Ledger, rank_demand, require_fit
from orchestrator.events import Event, EventKind
from orchestrator.executors.base import Cause, Executor, Signal
from orchestrator.frontier import Frontier, Inputs, ranks
from orchestrator.graph import Graph
from orchestrator.outcome import Failure, Outcome
from orchestrator.policies import Decision, RetryPolicy, backoff_s
from orchestrator.runs import Run, Status
from orchestrator.store import Key, Store
from orchestrator.tasks import Place, make_task

Listener = Callable[[Event], None]
POLL_S = 0.25
_BUSY_S = 0.5
_PATIENCE_S = 30.0
PENDING_S = 300.0
_LOG = logging.getLogger("moepipe.scheduler")


@dataclass
class _Flight:
    """A node that the executor has."""

    lock: FileLock
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
        loop = _Loop(graph, store, run, executor, list(listeners), Path(data_root), stop or threading.Event())
        try:
            return loop.run_to_end(kill or threading.Event())
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
    ledger: Ledger | None = None
    stopping: bool = False
    idle_since: float | None = None
    hits: int = 0
    ready: list[str] = field(default_factory=list)
    later: dict[str, float] = field(default_factory=dict)
    passed_over: dict[str, float] = field(default_factory=dict)
    flights: dict[str, _Flight] = field(default_factory=dict)
    inputs: dict[str, Inputs] = field(default_factory=dict)
    policies: dict[str, RetryPolicy] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    announced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.frontier = Frontier(self.graph)
        self.keys = KeyMaker(self.data_root)
        self.rank = ranks(self.graph)
        self.order = {name: index for index, name in enumerate(self.graph.nodes)}

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run_to_end(self, kill: threading.Event) -> Outcome:
        """See :func:`execute`."""
        self.executor.attach(self.stop)
        self.tell("run-started", pid=os.getpid(), host=socket.gethostname(), nodes=len(self.graph.nodes))
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
            self.watch_room()
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
        self.notify(self.run.finish(status, outcome.artifacts, hits=self.hits, failures=told))
        return outcome

    def begin_stop(self) -> None:
        """Start nothing more and ask what runs to stop."""
        self.stopping = True
        for name in self.flights:
            self.executor.cancel(name)

    def wait_s(self) -> float:
        """Seconds until a delayed node is due."""
        return max(0.0, min(self.later.values(), default=0.0) - time.monotonic())

    def tell(self, kind: EventKind, node: str = "", **data: Any) -> None:
        """Record an event and pass it on."""
        self.notify(self.run.record(kind, node, **data))

    def notify(self, event: Event) -> None:
        """Call the listeners. What they do with an event must not decide the run."""
        for listener in list(self.listeners):
            try:
                listener(event)
            except Exception:
                self.listeners.remove(listener)
                _LOG.exception("a listener failed and gets no more events")

    # ---- deciding --------------------------------------------------------------------------------------------------

    def decide(self, names: Sequence[str]) -> None:
        """Nodes whose parents are settled: hit, skipped, or ready to run. Walks on through hits."""
        todo = list(names)
        while todo:
            name = todo.pop()
            inputs = self.frontier.inputs(name)
            if inputs.missing:
                todo += self.skip(name, inputs.missing)
                continue
            self.inputs[name] = inputs
            if (digest := self.look_up(name)) is not None:
                todo += self.settle(name, digest)
            elif name not in self.failures:
                self.ready.append(name)
        self.ready.sort(key=lambda name: (-self.rank[name], self.order[name]))

    def look_up(self, name: str) -> str | None:
        """Digest of the stored result of a node, told as a hit."""
        try:
            key = self.keys.key(self.graph.nodes[name], self.inputs[name].digests)
            artifact = self.store.lookup(key)
        except MoepipeError as error:
            self.fail(name, Decision("fail", "user", 1, 0, error.message), error)
            return None
        if artifact is None:
            return None
        self.hits += 1
        self.tell("member-hit", name, digest=artifact.digest, key=key.digest, bytes=artifact.bytes)
        return artifact.digest

    def settle(self, name: str, digest: str | None) -> list[str]:
        """A node is done with; forget what was kept for it."""
        for kept in (self.inputs, self.policies, self.attempts, self.passed_over):
            kept.pop(name, None)  # type: ignore[attr-defined]
        return self.frontier.settle(name, digest)

    def skip(self, name: str, reason: str) -> list[str]:
        """A node that cannot run because of what failed before it."""
        error = RunFailed(f"{name} was skipped: it {reason}.")
        self.failures[name] = Failure(name, "upstream", error, "")
        self.tell("member-failed", name, decision="skip", cause="upstream", error=error.message, hint="", line="")
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
        reserved: set[str] = set()
        left: list[str] = []
        for index, name in enumerate(self.ready):
            if slots is not None and len(self.flights) >= slots:
                left += self.ready[index:]
                break
            if not self.fits(name, reserved, now) or not self.start(name):
                if name not in self.later:
                    left.append(name)
        self.ready = left

    def fits(self, name: str, reserved: set[str], now: float) -> bool:
        """Take a node's resources. One that was passed over for long keeps smaller ones off what it waits for."""
        resources = self.graph.nodes[name].resources
        if self.ledger is None:
            self.ledger = self.open_ledger()
        if self.ledger is None:
            return True
        wanted = set(rank_demand(resources))
        if not (wanted & reserved) and self.ledger.take(name, resources):
            self.passed_over.pop(name, None)
            return True
        if now - self.passed_over.setdefault(name, now) > _PATIENCE_S:
            reserved |= wanted
        return False

    def open_ledger(self) -> Ledger | None:
        """Ask for the capacity, at the first miss (a run of hits never starts Ray). None when it is not counted."""
        capacity = self.executor.capacity()
        if capacity is not None:
            rest = (node for name, node in self.graph.nodes.items() if name not in self.frontier.artifacts)
            require_fit([(node.id, node.resources) for node in rest], capacity)
        return None if capacity is None else Ledger(capacity)

    def start(self, name: str) -> bool:
        """Start a node whose resources are taken; False when another run is making the same artifact."""
        node = self.graph.nodes[name]
        key = self.keys.key(node, self.inputs[name].digests)
        lock = self.store.try_lock(key)
        if lock is None:
            if self.ledger is not None:
                self.ledger.give_back(name)
            if name not in self.announced:
                self.announced.add(name)
                self.tell("member-log", name, message="waits for another run that is making the same artifact")
            self.later[name] = time.monotonic() + _BUSY_S
            return False
        self.flights[name] = _Flight(lock, key)
        self.attempts[name] = self.attempts.get(name, 0) + 1
        place = Place(self.store, self.run, str(self.data_root))
        self.executor.start(make_task(self.graph, node, key, self.inputs[name], self.attempts[name], place))
        return True

    # ---- what comes back -------------------------------------------------------------------------------------------

    def deliver(self, signal: Signal) -> None:
        """Take what the executor says. Words of nodes that are not in flight come too late and do not count."""
        name, flight = signal.node, self.flights.get(signal.node)
        if flight is None:
            return
        if signal.kind == "finished":
            self.land(name)
            self.tell("member-finished", name, key=flight.key.digest, **signal.data)
            self.decide(self.settle(name, signal.data["digest"]))
        elif signal.kind == "failed":
            self.land(name)
            error = signal.error or RunFailed(f"{name} failed.")
            self.failed(name, flight, signal.cause or "infrastructure", error)
        elif signal.kind == "started":
            flight.started = time.monotonic()
            demand = rank_demand(self.graph.nodes[name].resources)
            self.tell("member-started", name, resources=demand, key=flight.key.digest, **signal.data)
        elif signal.kind == "progress":
            self.tell("member-progress", name, **signal.data)
        elif signal.kind == "metrics":
            self.tell("member-metrics", name, **signal.data)
        else:
            self.tell("member-log", name, **signal.data)

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
            self.tell_failure(name, decision, error)
        elif decision.action == "retry":
            self.tell_failure(name, decision, error)
            self.later[name] = time.monotonic() + backoff_s(decision.count)
            capacity = self.executor.capacity()
            if self.ledger is not None and capacity is not None:
                self.ledger.resize(capacity)
        else:
            self.fail(name, decision, error)

    def fail(self, name: str, decision: Decision, error: MoepipeError) -> None:
        """A node has failed for good."""
        self.failures[name] = Failure(name, decision.cause, error, str(self.run.log_path(name)))
        self.tell_failure(name, decision, error)
        self.decide(self.settle(name, None))

    def tell_failure(self, name: str, decision: Decision, error: MoepipeError) -> None:
        """The event of a failure, with the decision's line."""
        self.tell(
            "member-failed",
            name,
            decision=decision.action,
            cause=decision.cause,
            count=decision.count,
            limit=decision.limit,
            error=error.message,
            hint=error.hint,
            code=error.code,
            line=decision.line,
        )

    def watch_time(self) -> None:
        """End members that are over their time."""
        now = time.monotonic()
        for name, flight in self.flights.items():
            limit = self.graph.nodes[name].timeout_s
            if limit and flight.started and now - flight.started > limit and not flight.timed_out:
                flight.timed_out = True
                self.executor.cancel(name, kill=True)

    def watch_room(self) -> None:
        """Follow a cluster that shrank: wait for machines to come back, then say what is missing."""
        if self.flights or self.later or not self.ready or self.stopping or self.ledger is None:
            self.idle_since = None
            return
        now = time.monotonic()
        self.idle_since = self.idle_since or now
        capacity = self.executor.capacity()
        if capacity is not None:
            self.ledger.resize(capacity)
            if now - self.idle_since > PENDING_S:
                require_fit([(name, self.graph.nodes[name].resources) for name in self.ready], capacity)

    def land(self, name: str) -> None:
        """A node is no longer in flight."""
        self.flights.pop(name).lock.release()
        if self.ledger is not None:
            self.ledger.give_back(name)

    def release_all(self) -> None:
        """Let go of every lock."""
        for name in list(self.flights):
            self.land(name)
