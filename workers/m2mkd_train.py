"""Whole networks of m2mKD: the meta model, deep modules inside it, the assembled teacher, the modular model.

Phases pt, mt, ft and e2e of ``moe.algorithms.m2mkd`` over the project's loop: rates by epoch, decay groups, mixing and
clipping are the phase's; a run that was killed goes on from its checkpoint and writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from moe.algorithms.m2mkd import Config, Method
from moe.conversion.incubation import hybrid_module
from moe.conversion.modules import assemble_hybrids, load_assembled, split_state
from moe.errors import SpecError
from moe.models.nac.circuit import Circuit
from moe.models.nac.specs import CircuitSpec
from moe.models.vit_stages import ViTStages
from moe.models.vmoe import build_vit
from workers.checkpoints import CheckpointDir
from workers.context import Context, Input, run_seed
from workers.data import open_data, rows_of
from workers.datasets.base import DomainData
from workers.device import setup
from workers.engines.base import LossFunction, OptimizerOptions, ParamGroup, Weighted
from workers.engines.torch import TorchEngine, load_strict
from workers.loop import Evaluate, Evaluation, FitResult, LoopSpec, every, fit, mix
from workers.m2mkd_files import load_whole, require_spec, take_network, write_network
from workers.m2mkd_images import TrainImages, eval_reader
from workers.m2mkd_settings import image_side, in_order, phase_method
from workers.modelfile import MODEL_FILE, load_tensors
from workers.train_model import evaluate_rows

Phase = Literal["pt", "mt", "ft", "e2e"]


@dataclass(frozen=True)
class RunSettings:
    """What the stages add to a phase.

    Attributes:
        splits: whose rows are trained on.
        val_split: whose rows are scored after every epoch.
        epochs: instead of the phase's; 0 trains nothing.
        select: ``last`` keeps the last state, as the ViT trainer does; ``best`` the best on ``val_split``.
        precision: ``fp32``, ``bf16``, or None: bf16 where the phase asks for mixed precision.
        eval_batch: images per forward pass of an evaluation.
        checkpoint_every: updates between checkpoints.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: decoding threads.
    """

    splits: tuple[str, ...] = ("train",)
    val_split: str = "val"
    epochs: int | None = None
    select: Literal["last", "best"] = "last"
    precision: Literal["fp32", "bf16"] | None = None
    eval_batch: int = 128
    checkpoint_every: int = 100
    device: str = "auto"
    threads: int = 0


class Batches(Protocol):
    """Updates of a phase: number from 0 -> pieces, tuples whose last entry are the targets."""

    steps_per_epoch: int

    def __call__(self, step: int) -> Sequence[tuple[Any, ...]]:
        """The pieces of an update."""
        ...


@dataclass(frozen=True)
class Trained:
    """What :func:`run_phase` did: updates, state, history, and the images of one update."""

    steps: int
    state: Mapping[str, torch.Tensor]
    history: Sequence[Evaluation]
    batch_size: int

    def record(self) -> dict[str, Any]:
        """Part of an artifact's ``meta``."""
        last = self.history[-1].scores if self.history else {}
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "scores": {name: round(value, 6) for name, value in last.items()},
            "history": [{"step": e.step + 1, **{k: round(v, 6) for k, v in e.scores.items()}} for e in self.history],
        }


def train_member(
    config: Config,
    phase: Phase,
    position: int | None,
    settings: RunSettings,
    take: Sequence[str],
    label: str,
    context: Context,
) -> dict[str, Any]:
    """Train the network of a phase and write it into ``context.output``.

    Args:
        config: the method.
        phase: which network.
        position: module of phase mt.
        settings: of the stage.
        take: files to start from in place of the input ``init`` (see ``workers.m2mkd_files.take_network``).
        label: name in tables; empty takes one by phase.
        context: of the member; ports ``data`` and perhaps ``init``.

    Returns:
        The artifact's ``meta``.

    Raises:
        SpecError: data, initial network and settings do not belong together.
        CheckpointError: weights that do not fit.
    """
    device = setup(context.threads, settings.device).device
    data = open_data(context.inputs["data"][0], context.data_root)
    seed = run_seed(context.member)
    method = phase_method(config, phase, seed, position, data.info.num_outputs)
    check_data(method.config, phase, data)
    torch.manual_seed(mix(context.seed, 11))
    inputs = context.inputs.get("init", ())
    network = initial_network(method, phase, inputs, take, data.info.num_outputs, context)
    rows, val_rows = rows_of(data, settings.splits), rows_of(data, (settings.val_split,))
    side = image_side(method.config, phase)
    context.log(f"phase {phase}: {sum(p.numel() for p in network.parameters()):,} parameters, {len(rows)} rows")
    reader = eval_reader(data, side, method.config.augment, settings.threads)
    trained = run_phase(
        method,
        network,
        TrainImages(data, rows, side, method.config.training, method.config.augment, context.seed, settings.threads),
        settings,
        context,
        device,
        lambda module, step: evaluate_rows(module, data, val_rows, reader, settings.eval_batch, device),
        data.info.selection_metric,
    )
    record = write_network(network, context.output, trained.state)
    before = [int(artifact.meta.get("images", 0)) for artifact in inputs] if phase in ("ft", "e2e") else []
    return {
        **record,
        **trained.record(),
        "phase": phase,
        "position": position if position is not None else -1,
        "label": label or ("m2mKD" if phase == "e2e" and before else phase),
        "dataset": data.info.name,
        "image_size": side,
        "rows": len(rows),
        "images": trained.steps * trained.batch_size + max(before, default=0),
    }


def initial_network(
    method: Method, phase: Phase, inputs: Sequence[Input], take: Sequence[str], classes: int, context: Context
) -> nn.Module:
    """The network of a phase before its first update: fresh, from files, or from what is wired to ``init``."""
    config = method.config
    if take and phase not in ("pt", "ft"):
        raise SpecError(f"Phase {phase} cannot start from files.", "take belongs to pt and ft.")
    if phase == "mt":
        if len(inputs) != 1:
            raise SpecError(f"Phase mt needs one meta model as `init`, {len(inputs)} are wired.", "Wire phase pt.")
        require_spec(inputs[0], config.meta, "The meta model")
        drop = {"drop_path": config.training.drop_path}
        meta, teacher = config.meta.model_copy(update=drop), config.teacher.model_copy(update=drop)
        return hybrid_module(meta, teacher, config.positions[0], load_tensors(inputs[0].path / MODEL_FILE))
    if phase == "e2e" and inputs:
        return _assembled(method, inputs, classes)
    network = method.build(classes)
    if phase in ("pt", "ft"):
        whole = cast("ViTStages", network)
        spec = config.meta if phase == "pt" else config.teacher
        if take:
            load_whole(whole, take_network(take, spec, context.data_root), f"The network of phase {phase}")
        elif len(inputs) == 1 and inputs[0].meta.get("position", -1) < 0:
            require_spec(inputs[0], spec, f"The network of phase {phase}")
            load_whole(whole, load_tensors(inputs[0].path / MODEL_FILE), inputs[0].member)
        elif inputs:
            _assemble_teacher(whole, config, inputs)
    return network


def _assembled(method: Method, inputs: Sequence[Input], classes: int) -> nn.Module:
    """The modular model as it was assembled; stochastic depth is the phase's."""
    if len(inputs) > 1:
        raise SpecError(f"Phase e2e starts from one model, {len(inputs)} are wired.", "Wire one m2mkd_assemble stage.")
    artifact, config = inputs[0], method.config
    if config.vmoe is not None:
        network: nn.Module = build_vit(method.final_spec(classes))
    else:
        fields = {**(config.circuit.model_dump() if config.circuit else {}), "output_dim": classes}
        network = Circuit(CircuitSpec.model_validate(fields))
    wanted, seen = network.spec.model_dump(mode="json"), dict(artifact.meta["spec"])  # type: ignore[union-attr,operator]
    if {**wanted, "drop_path": 0} != {**seen, "drop_path": 0}:
        raise SpecError("The assembled model is not the one of these settings.", "Use one `method` in all stages.")
    load_strict(network, load_tensors(artifact.path / MODEL_FILE), what=f"The model of {artifact.member}")
    return network


def _assemble_teacher(network: ViTStages, config: Config, inputs: Sequence[Input]) -> None:
    """Stage i of the teacher from hybrid i."""
    depths = config.teacher.depths
    hybrids = []
    for artifact in in_order(inputs, len(depths), "The teacher"):
        state = load_tensors(artifact.path / MODEL_FILE)
        hybrids.append(split_state(state, tuple(artifact.meta["spec"]["depths"])))
    load_assembled(network, assemble_hybrids(hybrids, depths))


def run_phase(
    method: Method,
    network: nn.Module,
    images: Batches,
    settings: RunSettings,
    context: Context,
    device: torch.device,
    evaluate: Evaluate,
    metric: str,
    loss: LossFunction | None = None,
) -> Trained:
    """Train ``network`` in place through :func:`workers.loop.fit`.

    Args:
        method: the phase and its recipe.
        network: what is trained.
        images: what every update sees.
        settings: of the stage.
        context: of the member.
        device: where to train.
        evaluate: after every epoch.
        metric: score that selects.
        loss: ``(module, piece) -> Losses``; the method's by default.
    """
    phase = method.config.training
    per_epoch = images.steps_per_epoch
    epochs = phase.epochs if settings.epochs is None else settings.epochs
    if epochs == 0:
        network.to(device).eval()
        scores = {name: float(value) for name, value in evaluate(network, 0).items()}
        return Trained(0, network.state_dict(), [Evaluation(-1, scores, True)], phase.batch_size)
    # Another length stretches the schedule: the last epoch is always the end of the cosine.
    rates = phase.model_copy(update={"epochs": epochs, "warmup_epochs": min(phase.warmup_epochs, epochs)}).rates()
    groups = [ParamGroup(g.name, g.parameters, g.lr, g.weight_decay) for g in method.param_groups(network)]
    precision = settings.precision or ("bf16" if phase.amp else "fp32")
    options = OptimizerOptions(phase.optimizer, phase.betas, phase.eps, phase.momentum, phase.clip, precision)
    engine = TorchEngine(network, groups, options, device)
    spec = LoopSpec(
        steps=epochs * per_epoch,
        seed=mix(context.seed, 4),
        schedules={"*": lambda step: rates[min(step // per_epoch, epochs - 1)] / phase.scaled_lr},
        checkpoint_every=settings.checkpoint_every,
        evaluate_after=every(per_epoch),
        metric=metric,
    )
    folder = CheckpointDir(context.scratch / "checkpoints", log=context.log)
    of = loss or (lambda module, piece: method.loss(module, piece))
    result = fit(engine, lambda step: _weighted(images(step), device), spec, context, folder, evaluate, of)
    state = result.selected if settings.select == "best" else result.last
    network.load_state_dict(state)
    network.eval()
    return Trained(result.steps, state, _kept(result, settings), phase.batch_size)


def _kept(result: FitResult, settings: RunSettings) -> list[Evaluation]:
    """Evaluations up to the state that was kept."""
    if settings.select == "last" or result.best_step is None:
        return result.evaluations
    return [e for e in result.evaluations if e.step <= result.best_step]


def _weighted(pieces: Sequence[tuple[Any, ...]], device: torch.device) -> list[Weighted]:
    total = sum(len(piece[-1]) for piece in pieces)
    return [
        Weighted(tuple(None if x is None else x.to(device) for x in piece), len(piece[-1]) / total) for piece in pieces
    ]


def check_data(config: Config, phase: str, data: DomainData) -> None:
    """Refuse data whose task or channels do not fit, before anything is trained.

    Raises:
        SpecError: not a classification of several classes, or other channels.
    """
    if data.info.task != "multiclass":
        raise SpecError(f"m2mKD classifies; {data.info.name} is {data.info.task}.", "Use a set of several classes.")
    wanted = config.meta.channels
    if phase in ("e2e", "assemble"):
        wanted = config.vmoe.channels if config.vmoe is not None else config.circuit.input_dim  # type: ignore[union-attr]
    if wanted != data.info.channels:
        raise SpecError(
            f"Images of {data.info.name} have {data.info.channels} channels, the network takes {wanted}.",
            "Set channels of meta, teacher and the modular model.",
        )
