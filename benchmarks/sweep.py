"""A DomainBed sweep of 24 runs on RotatedMNIST: our sweep stage against one process per run, one after the other.

The baseline mirrors the public launcher: a fresh Python process for each run, which imports, reads and rotates MNIST,
trains, and evaluates every split of every domain, with all cores to itself. Ours runs the same 24 runs as members on
Ray, one compute thread each, once with the same evaluation (``exact``) and once with what selection needs
(``needed``). A small network stands in for the official one, so that 24 runs fit into minutes; wall time.

``python -m benchmarks.sweep ARGS.json FOLDER`` is one run of the baseline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.measure import Row
from benchmarks.setting import Sizes
from moe.specs import BackboneSpec
from orchestrator.executors.ray import RayExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec
from orchestrator.stages.sweep import SweepConfig
from orchestrator.store import Store
from workers.domainbed.jobs import Job
from workers.domainbed.run import EvaluationMode

METHODS = ("ERM", "IRM", "CORAL", "Fish")


def run(sizes: Sizes) -> list[Row]:
    """Two rows, exact and needed; the target of a half is asked of the sweep as a user would run it (``needed``)."""
    quick = sizes == Sizes.quick()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    dataset = "Debug28" if quick else "RotatedMNIST"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data_root = Path(os.environ.get("MOEPIPE_DATA", root / "data"))
        config = _config(dataset, quick, "exact")
        begin = time.perf_counter()
        _one_by_one(config.jobs(), config, root / "serial", data_root)
        serial = time.perf_counter() - begin
        # With several threads sums round otherwise, so that the last digits are compared on one, outside of the clock.
        sample = config.jobs()[:: max(1, len(config.jobs()) // len(METHODS))]
        _one_by_one(sample, config, root / "one_thread", data_root, threads=1)
        rows = []
        for evaluation in get_args(EvaluationMode):
            seconds, store, outcome = _sweep(_config(dataset, quick, evaluation), root / evaluation, data_root, cores)
            note = f"{len(config.jobs())} runs of {config.steps} updates on {cores} cores"
            if evaluation == "exact":
                same = _same_records(sample, root / "one_thread", store, outcome)
                note += f"; records equal in {same} of {len(sample)} runs repeated on one thread"
            what = f"sweep on {dataset}, evaluation: {evaluation} (wall time)"
            rows.append(Row(what, serial, seconds, 2.0, note))
    return rows


def _config(dataset: str, quick: bool, evaluation: EvaluationMode) -> SweepConfig:
    return SweepConfig(
        protocol="domainbed_2020",
        datasets=(dataset,),
        algorithms=METHODS[:1] if quick else METHODS,
        n_trials=1,
        n_hparams=1,
        steps=4 if quick else 40,
        checkpoint_freq=2 if quick else 20,
        hparams={"batch_size": 4 if quick else 32},
        backbone=BackboneSpec(name="tiny_cnn", width=8),
        evaluation=evaluation,
    )


def _one_by_one(jobs: Sequence[Job], config: SweepConfig, folder: Path, data_root: Path, threads: int = 0) -> None:
    """The public launcher: every run in a process of its own, on all cores or on ``threads`` of them."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"MOEPIPE_DATA": str(data_root), **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    for number, job in enumerate(jobs):
        target = folder / str(number)
        target.mkdir(parents=True)
        (target / "args.json").write_text(
            json.dumps({"args": job.train_args, "config": config.model_dump(mode="json")})
        )
        subprocess.run([sys.executable, "-m", "benchmarks.sweep", str(target)], env=environment, check=True)


def _sweep(config: SweepConfig, folder: Path, data_root: Path, cores: int) -> tuple[float, Store, Any]:
    """Wall time of the sweep on Ray, Ray's start included."""
    stages: dict[str, Any] = {"sweep": {"kind": "sweep", "config": config.model_dump(mode="json")}}
    spec = PipelineSpec(apiVersion="moepipe/v1", name="sweep", seeds=[0], stages=stages)
    store = Store.open(folder / "store")
    begin = time.perf_counter()
    record = RunStore(store).create(spec)
    outcome = execute(build_graph(spec), store, record, RayExecutor(num_cpus=cores), data_root=data_root)
    if outcome.status != "finished":
        raise SystemExit(f"The benchmark's run ended as {outcome.status}: {outcome.error}")
    return time.perf_counter() - begin, store, outcome


def _same_records(jobs: Sequence[Job], folder: Path, store: Store, outcome: Any) -> int:
    """Runs whose accuracies are those of the baseline to the last digit."""
    by_args = {}
    for digest in outcome.artifacts.values():
        artifact = store.artifact(digest)
        by_args[json.dumps(artifact.meta["args"], sort_keys=True)] = store.local_path(artifact)
    same = 0
    for number, job in enumerate(jobs):
        ours = by_args[json.dumps(job.train_args, sort_keys=True)] / "results.jsonl"
        same += _accuracies(ours) == _accuracies(folder / str(number) / "output/results.jsonl")
    return same


def _accuracies(path: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name.endswith("_acc")} for record in records]


class _Desk:
    """A member's context without a pipeline."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.run, self.member, self.seed = "benchmark", "run", 0
        self.inputs: dict[str, Any] = {}
        self.output, self.scratch, self.threads = folder / "output", folder / "scratch", threads
        self.data_root = Path(os.environ["MOEPIPE_DATA"])
        self.output.mkdir()
        self.scratch.mkdir()

    def progress(self, done: int, total: int, **values: float) -> None:
        """Nobody looks."""

    def log(self, message: str) -> None:
        """Nobody reads."""

    def metrics(self, values: Any, step: int | None = None) -> None:
        """Nobody compares."""

    def check(self) -> None:
        """Nobody asks to stop."""


def one_run(folder: Path) -> None:
    """One run of the baseline, with all cores."""
    import torch

    from workers.domainbed.run import RunSettings, run_job

    record = json.loads((folder / "args.json").read_text())
    config = SweepConfig(**record["config"])
    settings = RunSettings(
        protocol=config.protocol,
        methods={},
        backbone=None if config.backbone is None else config.backbone.model_dump(exclude_defaults=True),
        checkpoint_freq=config.checkpoint_freq,
        evaluation="exact",
        resume_every=10**9,
    )
    run_job(record["args"], settings, _Desk(folder, torch.get_num_threads()))  # type: ignore[arg-type]


if __name__ == "__main__":
    one_run(Path(sys.argv[1]))
