"""The meta-distillation job: what every rank runs, under Ray Train or alone in this process.

Data, student, aggregator and cached expert features -> episodes over the ranks -> engine -> checkpoints by name ->
``model.safetensors`` and ``aggregator.safetensors``. A rank that restarts, alone or in a group of another size, goes on
from the newest checkpoint in ``scratch``; Ray Train's own checkpoints are not used, because those count only once its
controller has read the report, and the last ones before a crash are lost.

Method: Meta-DMoE (arXiv 2210.03885). Ray Train sets up the process group before this function is called.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from moe.errors import SpecError
from moe.specs import BackboneSpec, StudentMoESpec
from workers.batches import ImageReader, Prefetcher
from workers.checkpoints import CheckpointDir
from workers.context import Reporter
from workers.data import load_data
from workers.datasets.base import DomainData
from workers.device import setup
from workers.distill_settings import DistillJob, DistillSettings, StoredModel
from workers.distill_validation import Validation
from workers.engines.base import Engine, OptimizerOptions, ParamGroup
from workers.episodes import Episodes
from workers.features import FeatureTable
from workers.loop import FitResult, LoopSpec, Schedule, epoch_halves, every, fit, mix
from workers.modelfile import (
    AGGREGATOR_FILE,
    MODEL_FILE,
    load_aggregator,
    load_student,
    model_meta,
    save_tensors,
)
from workers.networks import balance_left_out
from workers.protocols import domain_rows
from workers.schedules import constant, cosine_warmup, exponential_per_epoch
from workers.second_order import prepare
from workers.segments import STATE
from workers.transforms import Transform, transform_after

if TYPE_CHECKING:
    from moe.meta_step import EpisodeModule

__all__ = ["DistillJob", "StoredModel", "distill", "distilled_meta"]

RESULT_FILE = "distill.json"


class _Silent:
    """Reporter of the ranks that have none."""

    def progress(self, done: int, total: int, **values: float) -> None:
        """Says nothing."""

    def log(self, message: str) -> None:
        """Says nothing."""

    def check(self) -> None:
        """Never stops."""


def distill(config: dict[str, Any]) -> None:
    """Run the job on this rank.

    Args:
        config: fields of :class:`DistillJob`, and on rank 0 ``reporter``.

    Raises:
        SpecError, CheckpointError, DataError: inputs that do not fit together.
        RunFailed: the loss is not finite.
        Interrupted: a stop was asked for; the last checkpoint is kept.
    """
    reporter: Reporter = config.get("reporter") or _Silent()
    job = DistillJob(**{name: value for name, value in config.items() if name != "reporter"})
    settings = job.settings
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    _check_tasks(settings, world_size)
    _check_student(job)
    if left := balance_left_out(BackboneSpec(**job.student.meta["backbone"])):
        reporter.log(f"the meta step has no {left}; it leaves the routers as balanced as its gradients keep them.")
    device = setup(job.threads, settings.device, rank).device
    data = load_data(job.dataset, job.options, Path(job.data_root))
    with ExitStack() as stack:
        episodes, validation = _data_side(job, data, device, rank, world_size, stack)
        module = build_module(job, data).to(device)
        engine = make_engine(module, settings, device, reporter)
        stack.callback(engine.destroy)
        result = _fit(job, data, engine, episodes, validation, reporter, stack)
        if engine.rank == 0:
            write_result(job, module, result)
        engine.barrier()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    reporter.log(
        f"Distilled in {result.steps} steps on {engine.world_size} ranks; peak memory of rank 0: {peak:.2f} GB."
    )


def _check_tasks(settings: DistillSettings, world_size: int) -> None:
    """Gradients that are computed in the forward pass already hold the other ranks' share of the experts' gradient."""
    uneven = settings.tasks_per_step % world_size != 0
    if settings.ep_size > 1 and settings.meta.order != "second" and uneven:
        raise SpecError(
            f"Order {settings.meta.order!r} with ep_size={settings.ep_size} has "
            f"{settings.tasks_per_step} tasks per step for {world_size} ranks.",
            "Make tasks_per_step a multiple of the number of ranks, or use order: second.",
        )


def _check_student(job: DistillJob) -> None:
    """Refuse a student that cannot be rebuilt afterwards, and a block for one that has its own."""
    meta, asked = job.student.meta, job.settings.moe
    if "backbone" not in meta:
        raise SpecError(
            f"The student is a network of form {meta.get('form')!r}, whose record says no backbone.",
            "Wire a network that a train, jetpack_train or m2mkd stage made of a backbone.",
        )
    own = meta.get("moe")
    if own is not None and asked is not None and own != asked.model_dump(mode="json"):
        raise SpecError(
            "training.moe asks for an MoE block, but the student has one of other settings already.",
            "Set training.moe to null, or wire a student without a block.",
        )


def _data_side(
    job: DistillJob, data: DomainData, device: torch.device, rank: int, world_size: int, stack: ExitStack
) -> tuple[Episodes, Validation | None]:
    settings, table = job.settings, FeatureTable([Path(path) for path in job.features])
    train, evaluation = (_transform(job, data, name) for name in ("train", "eval"))
    reader = ImageReader(data.images, train, settings.loader_threads)
    stack.callback(reader.close)
    owner = {domain: expert for expert, domains in enumerate(job.groups) for domain in domains}
    rows = data.splits[job.split]
    episodes = Episodes(data, rows, reader, table, owner, settings, job.seed, device)
    if settings.validate_on is None:
        return episodes, None
    domains = domain_rows(data, settings.validate_on, "official", settings.support, settings.validation_rows)
    own = reader if evaluation.identity == train.identity else ImageReader(data.images, evaluation)
    stack.callback(own.close)
    size = settings.eval_batch_size
    return episodes, Validation(data, domains, own, table, size, device, rank, world_size)


def _transform(job: DistillJob, data: DomainData, name: str) -> Transform:
    return transform_after(job.student.meta, data.info, job.settings.image_size, train=name == "train")


def build_module(job: DistillJob, data: DomainData) -> EpisodeModule:
    """Student (with its MoE block, if asked for) and aggregator as one module; equal weights on all ranks."""
    from moe.meta_step import EpisodeModule

    torch.manual_seed(mix(job.seed, 3))
    student = load_student(Path(job.student.path), job.student.meta, job.settings.moe)
    aggregator = load_aggregator(Path(job.aggregator.path), job.aggregator.meta)
    # The classification head of the aggregator gets no gradient in meta-training and must not move.
    aggregator.mlp.requires_grad_(False)
    if job.settings.fast_second_order:
        image = data.images[int(data.splits[job.split][0])]
        prepare(student.features, _transform(job, data, "train").fixed(0).batch([np.asarray(image)]))
    return EpisodeModule(student, aggregator, job.settings.meta, data.info.task)


def make_engine(module: EpisodeModule, settings: DistillSettings, device: torch.device, reporter: Reporter) -> Engine:
    """The engine that the settings name; ``auto`` takes DeepSpeed where it can be imported and says so if not.

    Raises:
        SpecError: expert parallelism without DeepSpeed, or sizes that do not divide.
        EnvironmentProblem: DeepSpeed was asked for by name and is not there.
    """
    from workers.engines import deepspeed as parallel
    from workers.engines.torch import TorchEngine

    aggregator = [p for p in module.aggregator.parameters() if p.requires_grad]
    groups = [
        ParamGroup("student", list(module.student.parameters()), settings.student_lr, settings.weight_decay),
        ParamGroup("aggregator", aggregator, settings.aggregator_lr, settings.weight_decay),
    ]
    if module.rates is not None:
        groups.append(ParamGroup("rates", list(module.rates.parameters()), settings.rates_lr))
    # Precision is part of the meta step itself (autocast inside the episode), so the engine adds none.
    options = OptimizerOptions(settings.optimizer, momentum=0.9, clip=settings.clip)
    reason = "" if settings.engine == "torch" else parallel.available()
    if settings.engine == "deepspeed" or (settings.engine == "auto" and not reason):
        zero = parallel.DeepSpeedOptions(settings.zero_stage, settings.ep_size)
        return parallel.DeepSpeedEngine(module, groups, options, zero, device)
    if settings.ep_size > 1:
        raise SpecError(
            f"ep_size is {settings.ep_size}, and the torch engine keeps all experts on every rank.",
            "Use engine: deepspeed, or ep_size: 1.",
        )
    if reason:
        reporter.log(f"DeepSpeed is not available ({reason}); the torch engine is used instead.")
    return TorchEngine(module, groups, options, device)


def loop_spec(settings: DistillSettings, per_epoch: int, seed: int, metric: str) -> LoopSpec:
    """The loop of a job whose epochs have ``per_epoch`` steps."""
    by_epochs = settings.epochs * per_epoch if settings.epochs is not None else settings.steps
    steps = min(limit for limit in (by_epochs, settings.steps) if limit is not None)
    schedules: dict[str, Schedule] = {
        "exponential": exponential_per_epoch(settings.decay, per_epoch),
        "cosine": cosine_warmup(settings.warmup_epochs * per_epoch, steps),
        "constant": constant(),
    }
    chosen = schedules[settings.schedule]
    after = {
        "halves": epoch_halves(per_epoch),
        "epoch": every(per_epoch),
        "steps": every(settings.evaluate_every),
    }
    return LoopSpec(
        steps=steps,
        seed=mix(seed, 4),
        schedules={
            "student": chosen,
            "rates": chosen,
            "aggregator": chosen if settings.aggregator_schedule == "same" else constant(),
        },
        reset_optimizer_every=per_epoch if settings.reset_optimizer else None,
        ema_decay=settings.ema_decay,
        checkpoint_every=settings.checkpoint_every,
        evaluate_after=after[settings.cadence],
        metric=metric,
        best_from=0.0 if settings.parity == "official" else float("-inf"),
        patience=settings.patience,
    )


def _fit(
    job: DistillJob,
    data: DomainData,
    engine: Engine,
    episodes: Episodes,
    validation: Validation | None,
    reporter: Reporter,
    stack: ExitStack,
) -> FitResult:
    settings, rank, world_size = job.settings, engine.rank, engine.world_size
    if settings.tasks_per_step < world_size:
        reporter.log(
            f"tasks_per_step is {settings.tasks_per_step} on {world_size} ranks: "
            f"{world_size - settings.tasks_per_step} of them have nothing to do."
        )
    spec = loop_spec(settings, episodes.steps_per_epoch, job.seed, data.info.selection_metric)
    pad = settings.engine != "torch"
    depth = 2 if settings.loader_threads else 0
    batches = Prefetcher(lambda step: episodes.of_step(step, rank, world_size, pad), spec.steps, depth)
    stack.callback(batches.close)
    checkpoints = CheckpointDir(Path(job.scratch) / "checkpoints", log=reporter.log)
    if job.start is not None:
        if rank == 0:
            checkpoints.adopt(Path(job.start))
        engine.barrier()
    spec = replace(spec, pause=job.until)
    result = fit(engine, batches, spec, reporter, checkpoints, evaluate=validation)  # type: ignore[arg-type]
    if result.left and rank == 0:
        checkpoints.export(Path(job.output) / STATE)
    return result


def write_result(job: DistillJob, module: EpisodeModule, result: FitResult) -> None:
    """Write student, aggregator and ``distill.json`` (scores; no times, ranks or paths) into the output folder.

    Of a job that is to go on it is the last state.
    """
    best = job.settings.select == "best" and not result.left
    state = result.selected if best else result.last
    step = result.best_step if best and result.best_step is not None else result.steps - 1
    output = Path(job.output)
    for part, file in (("student.", MODEL_FILE), ("aggregator.", AGGREGATOR_FILE)):
        own = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        save_tensors(output / file, own)
    scores = [evaluation.scores for evaluation in result.evaluations if evaluation.step == step]
    record: dict[str, Any] = {
        "step": step,
        "steps": result.steps,
        "scores": result.paused or (scores[-1] if scores else {}),
        "evaluations": [{"step": e.step, "selected": e.selected, **e.scores} for e in result.evaluations],
    }
    if result.left:
        record["left"] = result.left
    if module.rates is not None:
        module.rates.rate.data.copy_(state["rates.rate"])
        record["rates"] = module.rates.values()
    (output / RESULT_FILE).write_text(json.dumps(record, indent=1, sort_keys=True))


def distilled_meta(job: DistillJob) -> dict[str, Any]:
    """The ``meta`` of the finished ``student`` artifact: how to rebuild student and aggregator, and its scores."""
    meta: Mapping[str, Any] = job.student.meta
    stored = meta.get("moe")
    moe = StudentMoESpec(**stored) if stored is not None else job.settings.moe
    record = json.loads((Path(job.output) / RESULT_FILE).read_text())
    made = model_meta(
        "student", BackboneSpec(**meta["backbone"]), meta["num_outputs"], meta["feature_dim"], meta["dataset"], moe
    )
    rates = {"rates": record["rates"]} if "rates" in record else {}
    return {
        **made,
        "aggregator": job.aggregator.meta["aggregator"],
        "adaptation": {
            "inner_lr": job.settings.meta.inner_lr,
            "inner_steps": job.settings.meta.inner_steps,
            "adapt": job.settings.meta.adapt,
            "support": job.settings.support,
            **rates,
        },
        "step": record["step"],
        "steps": record["steps"],
        "scores": record["scores"],
        **({"segment": {"updates": record["steps"], "left": record["left"]}} if "left" in record else {}),
    }
