"""What the driver costs: runs of up to thousands of members on a simulated fleet of 64 machines with 8 GPUs each.

Everything of a run is real but the machines: keys, look-ups, locks, ledger, events, retries' books. The executor is a
simulation that reports a start, ten rounds of progress and an end for each member, in bunches as a Ray executor would.
So what is measured is the driver's own time and memory per member, which bounds how large a fleet one driver can feed.

``python -m benchmarks.scheduler MEMBERS`` is one run in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Row
from orchestrator.capacity import Capacity
from orchestrator.executors.base import Deliver, Signal, Task
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec, Resources
from orchestrator.stages.base import STAGES
from orchestrator.store import Store

if TYPE_CHECKING:
    from benchmarks.setting import Sizes

KIND = "benchmark_fan"
ALLOWED_S = 0.005
_ROUNDS = 10
_QUIET = 40
_MACHINE = {"cpus": 64.0, "gpus": 8.0, "memory_gb": 512.0}


class Fleet:
    """The executor: 64 machines of 8 GPUs, members that take no time."""

    def __init__(self, machines: int = 64) -> None:
        self._capacity = Capacity(tuple(dict(_MACHINE) for _ in range(machines)))
        self._running: deque[tuple[Task, int]] = deque()
        self.most = 0
        self.quiet: list[float] = []

    def attach(self, stop: threading.Event) -> None:
        """Nothing to prepare."""

    def capacity(self) -> Capacity:
        """The whole fleet."""
        return self._capacity

    def slots(self) -> int | None:
        """No limit besides the GPUs."""
        return None

    def expect(self, resources: Resources, modules: Sequence[str]) -> None:
        """No gangs here."""

    def start(self, task: Task) -> None:
        """Begin."""
        self._running.append((task, 0))
        self.most = max(self.most, len(self._running))

    def poll(self, timeout: float, deliver: Deliver) -> None:
        """One round of every running member: its start, some progress, at last its result.

        Before it, once as many run as fit, some rounds in which nothing happens: what waiting costs.
        """
        if len(self._running) == 8 * len(self._capacity.machines) and len(self.quiet) < _QUIET:
            self.quiet.append(time.process_time())
            return
        for _ in range(len(self._running)):
            task, done = self._running.popleft()
            if done == 0:
                deliver(Signal(task.node, "started", {"attempt": 1, "pid": 1}))
            if done < _ROUNDS:
                deliver(Signal(task.node, "progress", {"done": done + 1, "total": _ROUNDS, "values": {"loss": 0.5}}))
                self._running.append((task, done + 1))
                continue
            digest = hashlib.sha256(task.node.encode()).hexdigest()
            deliver(Signal(task.node, "finished", {"digest": digest, "seconds": 1.0, "reused": False, "bytes": 1}))

    def cancel(self, node: str, kill: bool = False) -> None:
        """Never asked."""

    def close(self) -> None:
        """Nothing to free."""


def simulate(members: int) -> dict[str, Any]:
    """One run of ``members`` experts and one that takes them all; the figures of this process."""
    if KIND not in STAGES.names():
        STAGES.add(KIND, "benchmarks.scheduler_stages")
    expert = {"kind": KIND, "config": {"count": members}, "resources": {"cpus": 1, "gpus": 1}}
    last = {"kind": KIND, "config": {"count": 1}, "inputs": {"before": "${stages.experts}"}}
    spec = PipelineSpec(apiVersion="moepipe/v1", name="fleet", seeds=[0], stages={"experts": expert, "last": last})
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(folder)
        run, fleet = RunStore(store).create(spec), Fleet()
        begin, wall = time.process_time(), time.perf_counter()
        graph = build_graph(spec)
        built = time.process_time() - begin
        outcome = execute(graph, store, run, fleet, data_root=Path(folder) / "data")
        cpu = time.process_time() - begin
        return {
            "members": members,
            "finished": len(outcome.artifacts) - 1,
            "at_once": fleet.most,
            "cpu_s": cpu,
            "quiet_ms": 1000 * (fleet.quiet[-1] - fleet.quiet[0]) / (_QUIET - 1) if len(fleet.quiet) == _QUIET else 0.0,
            "graph_s": built,
            "wall_s": time.perf_counter() - wall,
            "events_bytes": (run.path / "events.jsonl").stat().st_size,
            "peak_mb": _peak_mb(),
        }


def _peak_mb() -> float:
    """Largest resident memory since this program started (``ru_maxrss`` counts the parent's at the fork)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(sizes: Sizes) -> list[Row]:
    """Driver time of 1,000 members against 5 ms each, and the memory that 3,000 take more than 300."""
    few, many, most = (30, 100, 300) if sizes == type(sizes).quick() else (300, 1000, 3000)
    small, middle, large = (_apart(members) for members in (few, many, most))
    per_member = 1000 * middle["cpu_s"] / many
    grown = large["peak_mb"] - small["peak_mb"]
    note = (
        f"{per_member:.2f} ms of driver time per member ({1000 * small['cpu_s'] / few:.2f} with {few}, "
        f"{1000 * large['cpu_s'] / most:.2f} with {most}), {middle['at_once']} at once; memory {small['peak_mb']:.0f} "
        f"-> {large['peak_mb']:.0f} MB from {few} to {most} members ({1024 * grown / (most - few):.0f} KB each); "
        f"record {middle['events_bytes'] / many:.0f} bytes per member; a round in which nothing happens "
        f"{large['quiet_ms']:.1f} ms with {most - large['at_once']} waiting"
    )
    return [Row(f"driver of {many} members against 5 ms each", ALLOWED_S * many, middle["cpu_s"], 1.0, note)]


def _apart(members: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scheduler", str(members)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert figures["finished"] == members
    return figures


if __name__ == "__main__":
    sys.stdout.write(json.dumps(simulate(int(sys.argv[1]))) + "\n")
