"""The expert stage: E members one after the other in this process, against E Ray actors on C cores.

Both run the same graph through the scheduler; data and split are made before the clock, Ray is started before it (a run
pays for that once). One compute thread per member, wall time.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.setting import Sizes
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
        store = Store.open(str(Path(folder) / "store"))
        data_root = Path(folder) / "data"
        _seconds(_pipeline(steps, experts=False), store, InlineExecutor(), data_root)
        warm = RayExecutor(num_cpus=cores)
        warm.connect()
        parallel = _seconds(_pipeline(steps), store, warm, data_root)
        # Another seed: the same work, and nothing of it is in the cache. Its data and split are made first.
        _seconds(_pipeline(steps, seed=1, experts=False), store, InlineExecutor(), data_root)
        serial = _seconds(_pipeline(steps, seed=1), store, InlineExecutor(), data_root)
    what = f"expert stage, {EXPERTS} members of {steps} steps on {cores} cores (wall time)"
    note = f"parallel efficiency {serial / parallel / cores:.2f}, asked for 0.90"
    return [Row(what, serial, parallel, 0.9 * cores, note)]


def _pipeline(steps: int, seed: int = 0, experts: bool = True) -> PipelineSpec:
    training = {"batch_size": 96, "steps": steps, "lr": 1e-3, "cadence": "steps", "evaluate_every": 10**6}
    stages: dict[str, Any] = {
        "data": {"kind": "prepare", "config": {"dataset": "digits5"}},
        "split": {"kind": "split", "inputs": {"data": "${stages.data}"}, "config": {"groups": EXPERTS}},
    }
    if experts:
        stages["experts"] = {
            "kind": "train",
            "inputs": {"data": "${stages.data}", "groups": "${stages.split}"},
            "config": {"backbone": {"name": "tiny_cnn"}, "groups": EXPERTS, "training": training},
        }
    return PipelineSpec(apiVersion="moepipe/v1", name="expert-stage", seeds=[seed], stages=stages)


def _seconds(spec: PipelineSpec, store: Store, executor: InlineExecutor | RayExecutor, data_root: Path) -> float:
    graph = build_graph(spec)
    run_record = RunStore(store).create(spec)
    begin = time.perf_counter()
    outcome = execute(graph, store, run_record, executor, data_root=data_root)
    seconds = time.perf_counter() - begin
    if outcome.status != "finished":
        raise SystemExit(f"The benchmark's run ended as {outcome.status}: {outcome.error}")
    return seconds
