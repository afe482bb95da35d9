"""One run of a sweep: DomainBed's training script over this project's loop.

The order of random draws is the public code's: seed everything, deal the environments, make the loaders, make the
network, then draw minibatches. Records are those of the public code but for times and memory, which are no function of
the arguments and go to the metrics; a run that was killed goes on from its checkpoint and leaves the same bytes.

``evaluation: needed`` leaves out what no selection method reads: ``in`` of training domains; ``out`` of a single
held-out domain but after the last update (the oracle reads only that); and, when no pairs of domains are held out,
``in`` of the held-out domain unless the checkpoint is the last, or the best one so far. A method that may end before
the last update (SWAD) treats every checkpoint as the last. What was left out is NaN.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe.errors import SpecError
from workers.checkpoints import CheckpointDir
from workers.context import Context
from workers.device import setup
from workers.domainbed.algorithms import MethodSpec, known_as, make_algorithm, method_of
from workers.domainbed.environments import EnvironmentSet, IntArray, open_environments
from workers.domainbed.hparams import Value, run_hparams
from workers.domainbed.jobs import DONE, RESULTS
from workers.domainbed.loader import InfiniteBatches
from workers.domainbed.protocol import Protocol, evaluation_steps, protocol, steps_per_epoch
from workers.domainbed.routing import write_routing
from workers.domainbed.scores import balanced_weights
from workers.domainbed.splits import split_domain
from workers.engines.base import OptimizerOptions
from workers.engines.torch import TorchEngine
from workers.evaluation_cost import IMAGES, model_cost
from workers.loop import Evaluation, FitResult, LoopSpec, fit, mix
from workers.modelfile import MODEL_FILE, save_tensors
from workers.networks import build_network, groups_of
from workers.transforms import Normalisation

EvaluationMode = Literal["exact", "needed"]


@dataclass(frozen=True)
class RunSettings:
    """What is the same for all runs of a sweep and is no official argument.

    Attributes:
        protocol: see :mod:`workers.domainbed.protocol`.
        methods: methods of one's own by name.
        backbone: network of all methods that do not bring their own; None takes the protocol's.
        dataset_options: of a registry data set.
        image_size: side in pixels; None takes the set's.
        normalisation: of the images; None takes the set's.
        checkpoint_freq: updates between evaluations; None takes the data set's.
        evaluation: see the module.
        pairs: the sweep also holds out pairs of domains.
        uda_fraction: share of a test domain's ``in`` set aside without labels.
        precision: ``fp32`` or ``bf16`` (forward and backward).
        device: ``auto``, ``cpu`` or ``cuda``.
        save_model: write the weights of the best checkpoint (training-domain validation).
        routing: images of each domain on which routers are recorded after training; 0 is off.
        merge: EMoE: also score the selected network with its experts put back, and write it as ``merged.safetensors``.
        resume_every: updates between checkpoints on disk.
        environments: number of domains that the sweep believes a data set has, by name.
    """

    protocol: str
    methods: Mapping[str, MethodSpec]
    backbone: Mapping[str, Any] | None = None
    dataset_options: Mapping[str, Any] | None = None
    image_size: int | None = None
    normalisation: Normalisation | None = None
    checkpoint_freq: int | None = None
    evaluation: EvaluationMode = "exact"
    pairs: bool = False
    uda_fraction: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    save_model: bool = False
    routing: int = 0
    merge: bool = False
    resume_every: int = 200
    environments: Mapping[str, int] = field(default_factory=dict)


def run_job(args: Mapping[str, Any], settings: RunSettings, context: Context) -> dict[str, Any]:
    """Train, evaluate, and write ``results.jsonl``, ``done`` and perhaps ``model.safetensors`` to ``context.output``.

    Args:
        args: official arguments of the run (``workers.domainbed.jobs.Job.train_args``).
        settings: of the sweep.
        context: of the member.

    Returns:
        The artifact's ``meta``: number of updates, method, hyper-parameters, last losses.

    Raises:
        SpecError: a name that the protocol does not know, or settings that do not fit.
        NotFoundError, DataError, CheckpointError: data or weights are missing or damaged.
    """
    started = time.perf_counter()
    device = setup(context.threads, settings.device).device
    run = _Run(args, settings, context, device)
    steps, frequency = run.steps, run.frequency
    due = set(evaluation_steps(steps, frequency))
    train = run.algorithm.config.train
    options = OptimizerOptions(train.optimizer, clip=train.clip, precision=settings.precision)
    engine = TorchEngine(run.network, groups_of(run.algorithm, run.network), options, device)
    spec = LoopSpec(
        steps=steps,
        seed=mix(int(args["seed"]), 3),
        checkpoint_every=settings.resume_every,
        evaluate_after=lambda step: step in due,
        metric="val",
    )
    context.log(run.describe())
    folder = CheckpointDir(context.scratch / "checkpoints", log=context.log)
    result = fit(
        engine, run.batches, spec, context, folder, run.evaluate, algorithm=run.algorithm, restored=run.restore
    )
    records = [run.record(evaluation) for evaluation in result.evaluations]
    write_records(records, context.output)
    if settings.save_model:
        save_tensors(context.output / MODEL_FILE, result.selected)
    if settings.routing:
        run.network.load_state_dict(result.selected)
        rows = [split.in_[: settings.routing] for split in run.splits]
        if not write_routing(run.network.eval(), run.data, rows, context.output):
            context.log("routing: nothing to record, this network has neither experts nor a class token")
    merged = run.merged(result, context.output) if settings.merge else {}
    context.metrics({"step_time": (time.perf_counter() - started) / steps})
    return {**run.meta(result), **merged, "cost": run.cost(result)}


def write_records(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """``results.jsonl`` and ``done`` as the public code leaves them."""
    (folder / RESULTS).write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
    (folder / DONE).write_text("done")


class _Run:
    """Everything that one run holds: environments, splits, minibatches, network, and what it evaluates."""

    def __init__(self, args: Mapping[str, Any], settings: RunSettings, context: Context, device: torch.device) -> None:
        self.args, self.settings, self.device = args, settings, device
        self.rules: Protocol = protocol(settings.protocol)
        name, seed = str(args["dataset"]), int(args["seed"])
        method = method_of(str(args["algorithm"]), settings.methods)
        torch.manual_seed(seed)
        generator = torch.default_generator
        self.data = open_environments(
            name,
            context.data_root,
            generator,
            settings.dataset_options,
            settings.image_size,
            settings.normalisation,
            context.threads,
        )
        self.test_envs = _checked_envs(args["test_envs"], self.data, settings.environments.get(name))
        self.hparams = _hparams(args, settings, method, self.data)
        self.steps = int(args.get("steps") or self._default("steps"))
        self.frequency = settings.checkpoint_freq or self._default("checkpoint_frequency")
        trial = int(args["trial_seed"])
        self.splits = [
            split_domain(
                len(environment),
                trial,
                number,
                float(args["holdout_fraction"]),
                settings.uda_fraction if number in self.test_envs else 0.0,
            )
            for number, environment in enumerate(self.data.environments)
        ]
        self.training = [number for number in range(len(self.splits)) if number not in self.test_envs]
        self.uda = [number for number in self.test_envs if len(self.splits[number].uda)]
        self._streams = [self._stream(number, generator) for number in self.training]
        for _ in range(2 * len(self.splits) + len(self.uda)):  # the base seeds of the evaluation loaders
            torch.empty((), dtype=torch.int64).random_()
        self.algorithm = make_algorithm(
            method, self.hparams, self.data, settings.protocol, self.steps, settings.backbone
        )
        self.network = build_network(self.algorithm, self.data.classes, context.data_root).to(device)
        self._minibatches = torch.Generator()
        self._minibatches.set_state(generator.get_state())
        for stream in self._streams:
            stream.use(self._minibatches)
        self._at = 0
        self._vals: dict[int, float] = {}
        self._observes = getattr(self.algorithm.averaging(), "observes", False)

    def describe(self) -> str:
        """One line for the log."""
        sizes = [len(split.in_) for split in self.splits]
        held = ", ".join(self.data.labels[number] for number in self.test_envs)
        return (
            f"{self.args['algorithm']} on {self.data.name}, {held} held out: {self.steps} updates of "
            f"{self.hparams['batch_size']} images from each of {len(self.training)} domains (`in` sizes {sizes})"
        )

    def _default(self, name: str) -> int:
        """Steps or checkpoint frequency of the protocol; for sets that it does not know, those of most."""
        from workers.domainbed.benchmark_sets import SETS

        if self.data.name not in SETS:
            return {"steps": 5001, "checkpoint_frequency": 300}[name]
        found: int = getattr(self.rules, name)(self.data.name)
        return found

    def _stream(self, number: int, generator: torch.Generator) -> InfiniteBatches:
        rows = self.splits[number].in_
        labels = self.data.environments[number].labels[rows]
        weights = balanced_weights(labels) if self.hparams.get("class_balanced") else None
        return InfiniteBatches(len(rows), int(self.hparams["batch_size"]), generator, weights)

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The minibatch of update ``step``, domain by domain; after a resume the earlier draws are repeated."""
        while self._at < step:
            for stream in self._streams:
                next(stream)
            self._at += 1
        self._at += 1
        augment = bool(self.hparams.get("data_augmentation", True))
        found = []
        for number, stream in zip(self.training, self._streams, strict=True):
            rows = self.splits[number].in_[np.asarray(next(stream))]
            found.append(
                self._read(number, rows, augment, np.random.default_rng([int(self.args["seed"]), step, number]))
            )
        return found

    def _read(self, number: int, rows: IntArray, augment: bool, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        environment = self.data.environments[number]
        images = environment.batch(rows, augment, random).to(self.device)
        return images, torch.from_numpy(environment.labels[rows]).to(self.device)

    def restore(self, evaluations: Sequence[Evaluation]) -> None:
        """Continue after these evaluations."""
        self._vals = {evaluation.step: evaluation.scores["val"] for evaluation in evaluations}

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """Accuracies of every split that counts, their mean over the training domains' ``out`` (``val``)."""
        exact = self.settings.evaluation == "exact"
        # An average that observes is looked at twice, first at its plain weights, and may end training at any time.
        final = step == self.steps - 1 or (self._observes and step in self._vals)
        scores: dict[str, float] = {}
        losses = []
        for number, split in enumerate(self.splits):
            held_out = number in self.test_envs
            last = final and len(self.test_envs) == 1
            for part, rows, needed in (("in", split.in_, False), ("out", split.out, last or not held_out)):
                found = (math.nan, math.nan)
                if exact or needed:
                    found = self._score(module, number, part, rows, step)
                scores[f"env{number}_{part}_acc"] = found[0]
                losses += [found[1]] if part == "out" and not held_out else []
        scores["val"] = float(np.mean([scores[f"env{number}_out_acc"] for number in self.training]))
        best = scores["val"] > max((val for at, val in self._vals.items() if at < step), default=-math.inf)
        self._vals[step] = scores["val"]
        for number in self.test_envs:
            if not exact and (self.settings.pairs or best or final):
                scores[f"env{number}_in_acc"] = self._score(module, number, "in", self.splits[number].in_, step)[0]
        for position, number in enumerate(self.uda):
            scores[f"env{position}_uda_acc"] = self._score(module, number, "uda", self.splits[number].uda, step)[0]
        return {**scores, "loss": float(np.mean(losses))} if self._observes else scores

    def _score(self, module: nn.Module, number: int, part: str, rows: IntArray, step: int) -> tuple[float, float]:
        """Accuracy and mean cross-entropy; NaN for an empty split."""
        if not len(rows):
            return math.nan, math.nan
        augment = (
            self.rules.augments_validation
            and number not in self.test_envs
            and bool(self.hparams.get("data_augmentation", True))
        )
        random = np.random.default_rng([int(self.args["seed"]), step, number, ("in", "out", "uda").index(part), 1])
        right, loss = 0, 0.0
        precision = self.settings.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=precision):
            for begin in range(0, len(rows), self.rules.eval_batch):
                images, labels = self._read(number, rows[begin : begin + self.rules.eval_batch], augment, random)
                logits = module(images).float()
                right += int((logits.argmax(1) == labels).sum())
                if self._observes:
                    loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return right / len(rows), loss / len(rows)

    def merged(self, result: FitResult, folder: Path) -> dict[str, Any]:
        """Score and write the selected network as a dense one; empty for a network without experts of its own neurons.

        ``merged`` has accuracies on ``out`` of training domains and ``in`` of held-out ones, before and after, and the
        residual: the largest deviation of an expert's output bias from the one used, 0 when the merge is exact.
        """
        from moe.models.emoe_blocks import converted_layers
        from moe.models.emoe_convert import merge_layers

        if not converted_layers(self.network):
            return {}
        self.network.load_state_dict(result.selected)
        step = result.steps if result.best_step is None else result.best_step
        before = self._both(self.network.eval(), step)
        dense = copy.deepcopy(self.network)
        residual = max(merge_layers(dense).values())
        after = self._both(dense.eval(), step)
        save_tensors(folder / "merged.safetensors", dense.state_dict())
        return {"merged": {"before": before, "after": after, "residual": residual}}

    def cost(self, result: FitResult) -> dict[str, Any]:
        """Parameters and operations of the selected network, on the first images of a held-out domain."""
        self.network.load_state_dict(result.selected)
        number = (self.test_envs or self.training)[0]
        images, _ = self._read(number, self.splits[number].in_[:IMAGES], False, np.random.default_rng(0))
        network = self.network.eval()
        each = [functools.partial(network, images[row : row + 1]) for row in range(len(images))]
        return model_cost(network, each).to_json()

    def _both(self, module: nn.Module, step: int) -> dict[str, float]:
        """Accuracy on `out` of training domains and `in` of held-out ones."""
        found = {}
        for number, split in enumerate(self.splits):
            part, rows = ("in", split.in_) if number in self.test_envs else ("out", split.out)
            found[f"env{number}_{part}_acc"] = self._score(module, number, part, rows, step)[0]
        return found

    def record(self, evaluation: Evaluation) -> dict[str, Any]:
        """One line of ``results.jsonl``."""
        scores = {name: value for name, value in evaluation.scores.items() if name.startswith("env")}
        per_epoch = steps_per_epoch([len(split.in_) for split in self.splits], int(self.hparams["batch_size"]))
        means = {"loss" if name == "loss" else f"loss_{name}": value for name, value in evaluation.means.items()}
        return {
            **scores,
            **means,
            "step": evaluation.step,
            "epoch": evaluation.step / per_epoch,
            "hparams": dict(self.hparams),
            "args": dict(self.args),
        }

    def meta(self, result: FitResult) -> dict[str, Any]:
        """What the artifact says about itself."""
        last = result.evaluations[-1]
        return {
            "args": dict(self.args),
            "hparams": dict(self.hparams),
            "labels": list(self.data.labels),
            "steps": result.steps,
            "protocol": self.settings.protocol,
            "evaluation": self.settings.evaluation,
            "precision": self.settings.precision,
            "data": self.data.digest,
            "selected_step": result.best_step,
            "last": {name: value for name, value in last.scores.items() if not math.isnan(value)},
        }


def _checked_envs(envs: Sequence[int], data: EnvironmentSet, believed: int | None = None) -> list[int]:
    if believed is not None and believed != len(data.labels):
        raise SpecError(
            f"`environments` says that {data.name} has {believed} domains, and it has {len(data.labels)}: "
            f"{', '.join(data.labels)}.",
            "Correct it; to hold out only some of them there is `test_envs`.",
        )
    if not envs or min(envs) < 0 or max(envs) >= len(data.labels) or len(set(envs)) == len(data.labels):
        raise SpecError(
            f"test_envs {list(envs)} do not fit {data.name}, which has the domains 0 to {len(data.labels) - 1}.",
            "Hold out at least one domain and keep at least one for training.",
        )
    return list(envs)


def _hparams(
    args: Mapping[str, Any], settings: RunSettings, method: MethodSpec, data: EnvironmentSet
) -> dict[str, Value]:
    """Hyper-parameters of a run: default or drawn, then what the sweep overrides."""
    known = known_as(data.name, data.small)
    drawn = run_hparams(settings.protocol, method.hparams_of, known, int(args["hparams_seed"]), int(args["trial_seed"]))
    return {**drawn, **(json.loads(args["hparams"]) if args.get("hparams") else {})}
