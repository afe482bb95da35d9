"""Whole networks of m2mKD: the meta model, deep modules inside it, the assembled teacher, the modular model.

Phases pt, mt, ft and e2e of ``moe.algorithms.m2mkd``, on one process or on each of several ranks
(``workers.m2mkd_job``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from moe.algorithms.m2mkd import Config, Method
from moe.conversion.incubation import hybrid_module
from moe.conversion.modules import assemble_hybrids, assemble_stages, load_assembled, split_state
from moe.errors import SpecError
from moe.models.nac.circuit import Circuit
from moe.models.nac.specs import CircuitSpec
from moe.models.vit_stages import ViTStages
from moe.models.vmoe import build_vit
from workers.context import Context, Input, run_seed
from workers.data import open_data, rows_of
from workers.datasets.base import DomainData
from workers.device import setup
from workers.engines.torch import load_strict
from workers.loop import mix
from workers.m2mkd_files import network_record, require_spec, write_network
from workers.m2mkd_images import TrainImages, eval_reader, served_transform
from workers.m2mkd_import import load_modular, load_whole, take_network
from workers.m2mkd_run import RunSettings, evaluate_over_ranks, ranks, run_phase
from workers.m2mkd_settings import image_side, in_order, phase_method
from workers.modelfile import MODEL_FILE, load_tensors

Phase = Literal["pt", "mt", "ft", "e2e"]


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
    rank, world_size = ranks()
    device = setup(context.threads, settings.device, rank).device
    data = open_data(context.inputs["data"][0], context.data_root)
    seed = run_seed(context.member)
    method = phase_method(config, phase, seed, position, data.info.num_outputs)
    check_data(method.config, phase, data)
    torch.manual_seed(mix(context.seed, 11))
    inputs = context.inputs.get("init", ())
    network = initial_network(method, phase, inputs, take, settings, data.info.num_outputs, context)
    rows, val_rows = rows_of(data, settings.splits), rows_of(data, (settings.val_split,))
    side = image_side(method.config, phase)
    context.log(f"phase {phase}: {sum(p.numel() for p in network.parameters()):,} parameters, {len(rows)} rows")
    reader = eval_reader(data, side, method.config.augment, settings.threads)
    training, augment = method.config.training, method.config.augment
    trained = run_phase(
        method,
        network,
        TrainImages(data, rows, side, training, augment, context.seed, settings.threads, rank, world_size),
        settings,
        context,
        device,
        lambda module, step: evaluate_over_ranks(module, data, val_rows, reader, settings.eval_batch, device),
        data.info.selection_metric,
    )
    record = network_record(network)
    if rank == 0:
        write_network(network, context.output, trained.state)
    before = [int(artifact.meta.get("images", 0)) for artifact in inputs] if phase in ("ft", "e2e") else []
    return {
        **record,
        **trained.record(),
        "phase": phase,
        "position": position if position is not None else -1,
        "label": label or ("m2mKD" if phase == "e2e" and before else phase),
        "dataset": data.info.name,
        "num_outputs": data.info.num_outputs,
        "transform": served_transform(data, side, augment),
        "image_size": side,
        "rows": len(rows),
        "images": trained.steps * trained.batch_size + max(before, default=0),
    }


def initial_network(
    method: Method,
    phase: Phase,
    inputs: Sequence[Input],
    take: Sequence[str],
    settings: RunSettings,
    classes: int,
    context: Context,
) -> nn.Module:
    """The network of a phase before its first update: fresh, from files, or from what is wired to ``init``."""
    config = method.config
    if phase == "mt":
        return _hybrid(config, inputs, take, context)
    if take and inputs:
        raise SpecError(
            f"Phase {phase} has files and a network to start from.", "Give `take` or wire `init`, not both."
        )
    if phase == "e2e" and inputs:
        return _assembled(method, inputs, classes)
    network = method.build(classes)
    if phase in ("pt", "ft"):
        whole = cast("ViTStages", network)
        spec = config.meta if phase == "pt" else config.teacher
        if take:
            state = take_network(take, spec, context.data_root, settings.take_blocks, settings.fresh_head)
            load_whole(whole, state, f"The network of phase {phase}")
        elif len(inputs) == 1 and inputs[0].meta.get("position", -1) < 0:
            require_spec(inputs[0], spec, f"The network of phase {phase}")
            load_whole(whole, load_tensors(inputs[0].path / MODEL_FILE), inputs[0].member)
        elif inputs:
            _assemble_teacher(whole, config, inputs)
    elif take:
        load_modular(network, take, settings.fresh_head)
    return network


def _hybrid(config: Config, inputs: Sequence[Input], take: Sequence[str], context: Context) -> nn.Module:
    """The meta model with one deep stage: fresh, or that of a whole teacher in files."""
    if len(inputs) != 1:
        raise SpecError(f"Phase mt needs one meta model as `init`, {len(inputs)} are wired.", "Wire phase pt.")
    require_spec(inputs[0], config.meta, "The meta model")
    drop, place = {"drop_path": config.training.drop_path}, config.positions[0]
    meta, teacher = config.meta.model_copy(update=drop), config.teacher.model_copy(update=drop)
    meta_state = load_tensors(inputs[0].path / MODEL_FILE)
    hybrid = hybrid_module(meta, teacher, place, meta_state)
    if take:
        stages = split_state(meta_state, config.meta.depths)
        deep = split_state(take_network(take, config.teacher, context.data_root), config.teacher.depths)[place]
        # A pretrained network brings no head; the meta model's is trained on.
        head = {name: value for name, value in stages[place].items() if name.startswith("head.")}
        stages[place] = {**head, **deep}
        load_assembled(hybrid, assemble_stages(stages, hybrid.spec.depths))
    return hybrid


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
