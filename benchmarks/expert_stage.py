"""The expert stage: E members one after the other in this process, against E Ray actors on C cores.

Both run the same graph through the scheduler; the clock starts when data and split are there, and Ray with them (a run
pays for that once). One compute thread per member, wall time. Beside it stands what the machine itself gives: as many
plain processes as there are cores that run the same training step, against one of them alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.setting import Sizes
from orchestrator.events import Event
from orchestrator.executors.inline import InlineExecutor
from orchestrator.executors.ray import RayExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec
from orchestrator.store import Store

EXPERTS = 4


def run(sizes: Sizes) -> list[Row]:
    """One row; the target is 0.9 of the number of cores."""
    quick = sizes == Sizes.quick()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    steps = 5 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        store, data_root = Store.open(str(Path(folder) / "store")), Path(folder) / "data"
        parallel = _seconds(_pipeline(steps), store, RayExecutor(num_cpus=cores), data_root)
        # Another seed: the same work, and nothing of it is in the cache.
        serial = _seconds(_pipeline(steps, seed=1), store, InlineExecutor(), data_root)
        alone, together = plain_processes(1, 5 if quick else 400), plain_processes(cores, 5 if quick else 400)
    what = f"expert stage, {EXPERTS} members of {steps} steps on {cores} cores (wall time)"
    note = (
        f"parallel efficiency {serial / parallel / cores:.2f}, asked for 0.90; plain processes {alone / together:.2f}"
    )
    return [Row(what, serial, parallel, 0.9 * cores, note)]


_STEPS = """
import sys, time, torch
from moe.tiny import TinyCNN
torch.set_num_threads(1)
network = TinyCNN(3, 10)
optimizer = torch.optim.Adam(network.parameters())
images, labels = torch.randn(96, 3, 32, 32), torch.randint(0, 10, (96,))
def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
for _ in range(20):
    step()
print("ready", flush=True)
sys.stdin.readline()
begin = time.perf_counter()
for _ in range(int(sys.argv[1])):
    step()
print(time.perf_counter() - begin)
"""


def plain_processes(processes: int, steps: int) -> float:
    """Seconds of the slowest of some processes that train at the same time and share nothing."""
    command = [sys.executable, "-c", _STEPS, str(steps)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(processes)]  # type: ignore[call-overload]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in running)


def _pipeline(steps: int, seed: int = 0) -> PipelineSpec:
    training = {"batch_size": 96, "steps": steps, "lr": 1e-3, "cadence": "steps", "evaluate_every": 10**6}
    stages: dict[str, Any] = {
        "data": {"kind": "prepare", "config": {"dataset": "digits5"}},
        "split": {"kind": "split", "inputs": {"data": "${stages.data}"}, "config": {"groups": EXPERTS}},
        "experts": {
            "kind": "train",
            "inputs": {"data": "${stages.data}", "groups": "${stages.split}"},
            "config": {"backbone": {"name": "tiny_cnn"}, "groups": EXPERTS, "training": training},
        },
    }
    return PipelineSpec(apiVersion="moepipe/v1", name="expert-stage", seeds=[seed], stages=stages)


def _seconds(spec: PipelineSpec, store: Store, executor: InlineExecutor | RayExecutor, data_root: Path) -> float:
    """Wall time of the experts, from the moment when the split was there to the end of the last one."""
    graph = build_graph(spec)
    run_record = RunStore(store).create(spec)
    split_done = end = 0.0

    def listen(event: Event) -> None:
        nonlocal split_done, end
        if event.kind == "member-finished":
            end = time.perf_counter()
            if event.node and event.node.startswith("split"):
                split_done = end

    outcome = execute(graph, store, run_record, executor, listeners=[listen], data_root=data_root)
    if outcome.status != "finished":
        raise SystemExit(f"The benchmark's run ended as {outcome.status}: {outcome.error}")
    return end - split_done
