"""Signs of life of members' processes, and the nodes that were told to go.

Ray notices a process that died, not one that stands still (a frozen machine, a disk that never answers). So every
process of a member, each rank of a gang included, says every few seconds that it is there and on which node. A process
that falls silent for ``MOEPIPE_STALL_S`` seconds (default 300, 0 never) counts as lost: it is killed, and its member is
tried elsewhere from its checkpoint, charged to ``infrastructure``. The thread that speaks needs the interpreter for an
instant only: long computations, compilations and downloads don't silence it.

A node that is about to go (a spot notice, ``ray drain-node``) is listed by Ray as draining. Members there are asked to
stop at their next checkpoint and go on elsewhere, charged to ``preemption``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from orchestrator.executors.base import Signal, Task

BEAT_S = 5.0
STALL_S = 300.0
VARIABLE = "MOEPIPE_STALL_S"
LOOK_S = 1.0


def stall_seconds() -> float:
    """``MOEPIPE_STALL_S`` of this process's environment."""
    return float(os.environ.get(VARIABLE, STALL_S))


class Beats:
    """Says that this process is alive while the block runs.

    Args:
        task: the member.
        emit: takes signals to the driver.
        who: which of the member's processes this is.
        every_s: seconds between two beats.
    """

    def __init__(self, task: Task, emit: Callable[[Signal], None], who: str, every_s: float = BEAT_S) -> None:
        self._task, self._emit, self._every_s = task, emit, every_s
        self._data = {"who": who, "attempt": task.attempt, "host": _this_node()}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moepipe-beats", daemon=True)

    def __enter__(self) -> Beats:
        self._say()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._say(ended=True)

    def _say(self, **more: Any) -> None:
        self._emit(Signal(self._task.node, "beat", {**self._data, **more}))

    def _run(self) -> None:
        while not self._done.wait(self._every_s):
            self._say()


class Lives:
    """The driver's side: who was heard of when, and where it is.

    Args:
        stall_s: silence after which a process counts as lost; None: ``MOEPIPE_STALL_S``.
        clock: seconds, monotonic (tests pass their own).
    """

    def __init__(self, stall_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stall_s = stall_seconds() if stall_s is None else stall_s
        self._clock = clock
        self._heard: dict[str, dict[str, float]] = {}
        self._hosts: dict[str, set[str]] = {}
        self._listened = clock()

    def take(self, signal: Signal) -> None:
        """A beat arrived."""
        heard, who = self._heard.setdefault(signal.node, {}), signal.data["who"]
        self._hosts.setdefault(signal.node, set()).add(signal.data["host"])
        if signal.data.get("ended"):
            heard.pop(who, None)
        else:
            heard[who] = self._clock()

    def forget(self, node: str) -> None:
        """The member is not running any more."""
        self._heard.pop(node, None)
        self._hosts.pop(node, None)

    def nodes(self) -> list[str]:
        """Who was heard of and not forgotten."""
        return list(self._heard)

    def hosts(self, node: str) -> set[str]:
        """Nodes of the cluster where processes of the member were heard of."""
        return set(self._hosts.get(node, ()))

    def listen(self) -> None:
        """All beats so far have been taken. After a time of deafness (ours) everybody gets a new start."""
        now = self._clock()
        if now - self._listened > BEAT_S:
            self._heard = {node: dict.fromkeys(heard, now) for node, heard in self._heard.items()}
        self._listened = now

    def silent(self) -> dict[str, str]:
        """Member -> what to say about it, for those with a process that fell silent."""
        now = self._clock()
        if not self.stall_s or now - self._listened > BEAT_S:
            return {}
        found: dict[str, str] = {}
        for node, heard in self._heard.items():
            for who, last in heard.items():
                if now - last > self.stall_s:
                    found[node] = f"{who} gave no sign of life for {now - last:.0f} s"
        return found


def draining_nodes() -> set[str]:
    """Ids of the cluster's nodes that were told to go."""
    import ray

    try:
        return set(ray._private.state.state.get_draining_nodes())
    except Exception:  # no documented errors; a head that is away is noticed elsewhere
        return set()


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
