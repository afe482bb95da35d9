"""What an executor is: something that runs tasks and says what became of them. Small, after submitit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moe.errors import MoepipeError
from orchestrator.capacity import Capacity
from orchestrator.spec import Resources, Retry
from orchestrator.store import Key

Cause = Literal["user", "out_of_memory", "preemption", "infrastructure", "interrupted", "timeout", "upstream"]
SignalKind = Literal["started", "progress", "metrics", "log", "finished", "failed", "beat"]


@dataclass(frozen=True)
class InputRef:
    """An arriving artifact by name: what a process needs to open it from the store."""

    member: str
    digest: str


@dataclass(frozen=True)
class Task:
    """Everything that a process, here or on another machine, needs to run one member. Plain data, pickles.

    Attributes:
        node: id of the node.
        kind: stage kind.
        module: dotted module with the class ``Stage``.
        config: the stage's config as JSON.
        member: name of the member without seed.
        params: its parameters.
        member_path: name within the stage including the seed, e.g. ``seed=0/group=2``.
        output: artifact kind.
        seed: of the context.
        key: cache key under which the result is committed.
        inputs: port -> artifacts.
        left_out: port -> members that failed and were tolerated by ``min_success``.
        resources: what a rank takes.
        stall_s: silence after which a process that works on it counts as lost; 0 is never.
        retry: budgets by cause; the scheduler keeps them for members, a search for the processes of its trials.
        gang: the stage calls ``context.train``.
        store: URL of the store; ``cache`` its local folder.
        run: run id.
        log: path of the member's log.
        data_root: folder with prepared data sets.
        attempt: 1 for the first.
        leads: the stage starts processes that take the member's resources; its own takes none.
        slots: how many times its resources the member has.
        kinds: modules of the other stage kinds that it works with, by name.
    """

    node: str
    kind: str
    module: str
    config: Mapping[str, Any]
    member: str
    params: Mapping[str, Any]
    member_path: str
    output: str
    seed: int
    key: Key
    inputs: Mapping[str, tuple[InputRef, ...]]
    left_out: Mapping[str, tuple[str, ...]]
    resources: Resources
    gang: bool
    store: str
    cache: str
    run: str
    log: str
    data_root: str
    attempt: int = 1
    weight: float = 1.0
    leads: bool = False
    slots: int = 1
    kinds: Mapping[str, str] = field(default_factory=dict)
    stall_s: float = 0.0
    retry: Retry = field(default_factory=Retry)


@dataclass(frozen=True)
class Signal:
    """What an executor says about a node.

    Attributes:
        node: which.
        kind: ``started`` | ``progress`` | ``metrics`` | ``log`` | ``finished`` (data: digest, seconds, reused) |
            ``failed`` (cause, error) | ``beat`` (a sign of life, for the executor alone).
        data: plain JSON.
        cause: of a failure.
        error: of a failure.
    """

    node: str
    kind: SignalKind
    data: Mapping[str, Any] = field(default_factory=dict)
    cause: Cause | None = None
    error: MoepipeError | None = None


Deliver = Callable[[Signal], None]


class Executor(Protocol):
    """Runs tasks. Used by one thread."""

    def attach(self, stop: threading.Event) -> None:
        """Called once before the first task, with the event that asks for a graceful stop."""
        ...

    def capacity(self) -> Capacity | None:
        """What there is to give out; None when resources are not counted. Asked again after failures of machines."""
        ...

    def slots(self) -> int | None:
        """Tasks it takes at once besides the resources; None for no such limit."""
        ...

    def start(self, task: Task) -> None:
        """Begin a task. Returns at once; what happens is delivered by :meth:`poll`."""
        ...

    def expect(self, resources: Resources, modules: Sequence[str]) -> None:
        """A gang of this shape is wanted as soon as what runs now has finished; its ranks may be started ahead.

        Args:
            resources: ranks, and what each takes.
            modules: what they will import.
        """
        ...

    def poll(self, timeout: float, deliver: Deliver) -> None:
        """Deliver what happened since the last call; waits at most ``timeout`` seconds for something to happen."""
        ...

    def cancel(self, node: str, kill: bool = False) -> None:
        """Ask a task to stop at its next checkpoint, or (``kill``) end its process now; it is then reported failed."""
        ...

    def close(self) -> None:
        """End everything that is still running and free what was started."""
        ...
