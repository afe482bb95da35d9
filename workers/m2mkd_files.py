"""Networks and modules of m2mKD as files: what a member writes, and reading just the blocks that it needs.

A network or module is ``model.safetensors`` beside a JSON record with its form and spec. Tensors are read one by one,
so a teaching pair in the middle of a ViT-H loads three of its 32 blocks and the meta model's blocks after its place.
Files of other people come in through ``workers.m2mkd_import``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.conversion.modules import stage_of
from moe.errors import CheckpointError, NotFoundError, SpecError
from moe.keymaps.m2mkd import check_weights
from moe.models.vit_specs import ViTSpec, VMoESpec
from moe.models.vit_stages import ViTStages
from moe.specs import BackboneSpec
from workers.context import Input
from workers.engines.torch import load_strict
from workers.modelfile import MODEL_FILE, load_tensors, save_tensors

State = dict[str, Tensor]


def form_of(module: nn.Module) -> str:
    """``vit``, ``vmoe`` or ``circuit``."""
    spec = getattr(module, "spec", None)
    if isinstance(spec, VMoESpec):
        return "vmoe"
    return "vit" if isinstance(spec, ViTSpec) else "circuit"


def write_network(module: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Write weights (the module's own by default) and return the record that :func:`read_network` needs."""
    save_tensors(folder / MODEL_FILE, module.state_dict() if state is None else state)
    return network_record(module)


def network_record(module: nn.Module) -> dict[str, Any]:
    """Form and spec of a network; a whole transformer also says which backbone it is, so that other stages take it."""
    record = {"form": form_of(module), "spec": module.spec.model_dump(mode="json")}  # type: ignore[union-attr,operator]
    spec = module.spec
    if not isinstance(spec, ViTSpec) or spec.part != "whole":
        return record
    network = spec if isinstance(spec, VMoESpec) else VMoESpec(**spec.model_dump())
    backbone = BackboneSpec(name="vmoe", channels=spec.channels, image_size=spec.image_size, vmoe=network)
    return {**record, "backbone": backbone.model_dump(mode="json"), "feature_dim": spec.dim}


def read_network(artifact: Input, quiet: bool = False) -> nn.Module:
    """The network of an artifact, in evaluation mode.

    Args:
        artifact: of :func:`write_network`.
        quiet: a circuit without noise in evaluation.

    Raises:
        CheckpointError: damaged file, or tensors that do not fit the record.
    """
    form, spec = artifact.meta["form"], dict(artifact.meta["spec"])
    module: nn.Module
    if form == "circuit":
        from moe.models.nac.circuit import Circuit
        from moe.models.nac.specs import CircuitSpec

        module = Circuit(CircuitSpec.model_validate({**spec, **({"eval_noise": "off"} if quiet else {})}))
    else:
        from moe.models.vmoe import build_vit

        module = build_vit((VMoESpec if form == "vmoe" else ViTSpec)(**spec))
    load_strict(module, load_tensors(artifact.path / MODEL_FILE), what=f"The network of {artifact.member}")
    return module.eval()


def require_spec(artifact: Input, spec: ViTSpec, what: str) -> None:
    """A network that is wired must be the one that the settings describe, but for stochastic depth.

    Raises:
        SpecError: names the fields that differ.
    """
    ignored = {"drop_path"}
    if artifact.meta.get("form") != "vit":
        raise SpecError(f"{what} is a {artifact.meta.get('form')}, a ViT is needed.", "Wire the phase before this one.")
    theirs, own = artifact.meta["spec"], spec.model_dump(mode="json")
    wrong = [f"{k}={theirs.get(k)} instead of {v}" for k, v in own.items() if k not in ignored and theirs.get(k) != v]
    if wrong:
        raise SpecError(f"{what} is another network: {'; '.join(wrong)}.", "Use the same `method` in all stages.")


def read_some(path: Path, wanted: Callable[[str], bool]) -> State:
    """Those tensors of a safetensors file whose name is wanted; the others are not read.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NotFoundError(f"There is no weights file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}).", "Submit again.") from error


def teacher_module(artifact: Input, spec: ViTSpec, position: int) -> ViTStages:
    """Module ``position`` of a whole teacher; only its own tensors are read.

    Args:
        artifact: the teacher.
        spec: of the whole teacher.
        position: 0-based.

    Raises:
        SpecError: the artifact is another network.
        CheckpointError: tensors are missing or of another shape.
    """
    require_spec(artifact, spec, "The teacher")
    start = spec.spans[position][0]
    state = read_some(artifact.path / MODEL_FILE, lambda name: stage_of(name, spec.depths) == position)
    local = {renumbered(name, -start): value for name, value in state.items()}
    part = spec.stage(position)
    check_weights(local, part, f"Teacher module {position}")
    module = ViTStages(part)
    module.load_state_dict(local)
    return module


def frozen_meta(artifact: Input, spec: ViTSpec, position: int, prefix: bool) -> ViTStages:
    """The meta model as one pair uses it: blocks after the position and, with ``prefix``, those before it.

    What is not used is neither read nor kept; the replaced stage itself never is.

    Raises:
        SpecError: the artifact is another network.
        CheckpointError: tensors are missing or of another shape.
    """
    require_spec(artifact, spec, "The meta model")
    start, end = spec.spans[position]
    last = end == spec.depth
    before = prefix and position > 0
    with torch.device("meta"):
        module = ViTStages(spec)
    for index in range(spec.depth):
        if not (before and index < start) and index < end:
            module.blocks[index] = nn.Identity()
    if not before:
        module.cls_token, module.pos_embed = None, None  # type: ignore[assignment]
        module.patch_embed = nn.Identity()
    if last:
        module.norm, module.head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    own = module.state_dict()
    state = read_some(artifact.path / MODEL_FILE, own.__contains__)
    wrong = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise CheckpointError(f"The meta model lacks {', '.join(wrong[:5])}, or has them in another shape.")
    module.load_state_dict(state, assign=True)
    return module


def renumbered(name: str, by: int) -> str:
    """A tensor's name when its block's number is larger by ``by``."""
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(int(parts[1]) + by)
    return ".".join(parts)
