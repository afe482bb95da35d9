"""One member of ``jetpack_train``: fine-tune one start, and record its accuracy at fixed updates.

Source: MoE Jetpack (arXiv 2406.04801), section 3.3 and appendix, and its public code: AdamW with rates by layer, linear
warm-up and cosine, mixup or CutMix on every batch, smoothed cross-entropy, accumulated micro-batches. Parity: the
result is the last state (or its average), not the best one; the schedule counts micro-batches.

All starts of a seed see the same batches, mixed in the same way.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from moe.algorithms.jetpack import Config, Method
from moe.errors import SpecError
from moe.jet_specs import JetConvNeXtSpec, jet_spec
from moe.jetpack_specs import JetViTSpec
from workers.batches import ImageReader
from workers.checkpoints import CheckpointDir
from workers.context import Context, run_seed
from workers.data import open_data, rows_of
from workers.datasets.base import DomainData
from workers.device import setup
from workers.engines.base import OptimizerOptions, ParamGroup, Weighted
from workers.engines.torch import TorchEngine
from workers.jetpack_images import TrainingImages
from workers.jetpack_recycle import open_network
from workers.jetpack_settings import RECIPE_FIELDS, RecipeSettings
from workers.loop import FitResult, LoopSpec, every, fit, mix
from workers.modelfile import MODEL_FILE, save_tensors
from workers.sampling import EpochSampler
from workers.train_model import evaluate_rows
from workers.transforms import Transform, transform_for

CURVE = "curve.json"


def train_member(settings: RecipeSettings, context: Context) -> dict[str, Any]:
    """Write ``curve.json`` and perhaps ``model.safetensors``; returns ``meta``.

    Args:
        settings: the recipe.
        context: ports ``data`` and ``start``.

    Raises:
        SpecError: the start was made for other classes, or rates that do not suit its network.
        CheckpointError: damaged weights.
        RunFailed: the loss is not finite.
    """
    device = setup(context.threads, settings.device).device
    data = open_data(context.inputs["data"][0], context.data_root)
    start = context.inputs["start"][0]
    network = open_network(start)
    meta = start.meta
    if (meta["dataset"], meta["num_outputs"]) != (data.info.name, data.info.num_outputs):
        raise SpecError(
            f"The start has {meta['num_outputs']} outputs for {meta['dataset']}, the data set is {data.info.name} with "
            f"{data.info.num_outputs}.",
            "Wire one data set to both stages.",
        )
    run = _Run(settings, data, network, jet_spec(meta["spec"]), jet_spec(meta["model"]), context, device)
    context.log(run.describe(meta["start"]))
    try:
        result = run.fit(context)
        network.load_state_dict(result.last)
        tests = {split: run.scores(network.eval(), split) for split in settings.test_splits}
    finally:
        run.close()
    curve = [
        {"step": e.step + 1, "loss": e.means.get("loss"), **{n: round(v, 6) for n, v in e.scores.items()}}
        for e in result.evaluations
    ]
    record = {"start": meta["start"], "seed": run.seed, "metric": data.info.selection_metric, "curve": curve}
    (context.output / CURVE).write_text(json.dumps({**record, "tests": tests}, indent=1, sort_keys=True))
    if settings.keeps(meta["start"]):
        save_tensors(context.output / MODEL_FILE, result.last)
    context.metrics({f"{split}/{name}": value for split, own in tests.items() for name, value in own.items()})
    kept = ("form", "start", "network", "select", "spec", "model", "num_outputs", "dataset", "origin", "parameters")
    return {
        **{name: meta[name] for name in kept},
        **{name: meta[name] for name in ("backbone", "feature_dim", "image_size") if name in meta},
        "seed": run.seed,
        "metric": data.info.selection_metric,
        "steps": result.steps,
        "steps_per_epoch": run.per_epoch,
        "batch": settings.batch_size * settings.accumulate,
        "rows": len(run.rows),
        "val": {name: value for name, value in curve[-1].items() if name not in ("step", "loss")},
        "tests": tests,
        "transform": run.transform.spec.model_dump(mode="json"),
        "miniature": bool(context.inputs["data"][0].meta.get("miniature")),
    }


class _Run:
    """Rows, batches, engine and scores of one fine-tuning."""

    def __init__(
        self,
        settings: RecipeSettings,
        data: DomainData,
        network: nn.Module,
        spec: JetViTSpec | JetConvNeXtSpec,
        model: JetViTSpec | JetConvNeXtSpec,
        context: Context,
        device: torch.device,
    ) -> None:
        if isinstance(spec, JetConvNeXtSpec) and settings.rates.rule != "default":
            raise SpecError(
                f"rates.rule {settings.rates.rule!r} counts the blocks of a vision transformer; this is a ConvNeXt.",
                "Set rates: {rule: default}, as the paper's presets (NAME-paper) do.",
            )
        self.settings, self.data, self.device = settings, data, device
        self.seed = run_seed(context.member)
        recipe = {name: getattr(settings, name) for name in RECIPE_FIELDS}
        self.method = Method(Config(model=model, recycle=None, parity=settings.parity, **recipe), data.info.task)
        self.rows = rows_of(data, settings.splits)
        self.transform = transform_for(
            data.info, spec.image_size, train=False, normalisation=settings.normalisation, channels=spec.channels
        )
        if settings.evaluate_on == "centre":
            self.transform = Transform(
                self.transform.spec.model_copy(update={"short_edge": round(spec.image_size * 8 / 7)})
            )
        self.images = TrainingImages(data, self.transform, settings.augment)
        self.reader = ImageReader(data.images, self.transform)
        self.sampler = EpochSampler(self.rows, settings.batch_size, mix(self.seed, 41))
        self.per_epoch = self.sampler.steps_per_epoch
        self.micro = settings.epochs * self.per_epoch
        updates = -(-self.micro // settings.accumulate)
        self.steps = updates if settings.steps is None else min(updates, settings.steps)
        groups = [ParamGroup(g.name, g.parameters, g.lr, g.weight_decay) for g in self.method.param_groups(network)]
        options = OptimizerOptions("adamw", clip=settings.clip, precision=settings.precision)
        self.engine = TorchEngine(network, groups, options, device)
        self.labels = torch.from_numpy(np.ascontiguousarray(data.labels))

    def describe(self, start: str) -> str:
        """One line for the log."""
        size = f"{self.settings.accumulate} x {self.settings.batch_size}"
        return f"fine-tuning {start!r} on {len(self.rows)} rows: {self.steps} updates of {size} images"

    def fit(self, context: Context) -> FitResult:
        """Train to the end, from the newest checkpoint."""
        settings = self.settings
        spec = LoopSpec(
            steps=self.steps,
            seed=mix(self.seed, 43),
            schedules={"*": self.factor},
            ema_decay=settings.ema_decay,
            checkpoint_every=settings.checkpoint_every,
            evaluate_after=every(settings.evaluate_every),
            metric=self.data.info.selection_metric,
            best_from=float("inf"),  # no state but the last one is used, so none is kept
        )
        return fit(
            self.engine,
            self.batches,
            spec,
            context,
            CheckpointDir(context.scratch / "checkpoints", log=context.log),
            evaluate=lambda module, step: self.scores(module, settings.val_split),
            loss_fn=self.method.loss,
        )

    def factor(self, update: int) -> float:
        """Of the rates: that of the last micro-batch of an update."""
        last = min((update + 1) * self.settings.accumulate, self.micro) - 1
        return self.method.config.schedule.factor(last, self.per_epoch)

    def batches(self, update: int) -> list[Weighted]:
        """The micro-batches of an update; the last update may have fewer."""
        size = self.settings.accumulate
        numbers = range(update * size, min((update + 1) * size, self.micro))
        return [Weighted(self._micro_batch(number), 1 / len(numbers)) for number in numbers]

    def _micro_batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.sampler.batch(number)
        images = self.images.read(rows, mix(self.seed, 44, number))
        seed = mix(self.seed, 42, number)
        draws = np.random.RandomState(seed % 2**32), torch.Generator().manual_seed(seed)
        labels = self.labels[torch.from_numpy(rows)]
        images, targets = self.method.mix(images, labels, self.data.info.num_outputs, *draws)
        return images.to(self.device), targets.to(self.device)

    def scores(self, module: nn.Module, split: str) -> dict[str, float]:
        """Scores of a split."""
        rows = rows_of(self.data, (split,))
        found = evaluate_rows(module, self.data, rows, self.reader, self.settings.eval_batch_size, self.device)
        return {name: round(float(value), 6) for name, value in found.items()}

    def close(self) -> None:
        """End the readers."""
        self.images.close()
        self.reader.close()
