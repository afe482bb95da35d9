"""Networks and modules of m2mKD as files: what a member writes, and reading just the blocks that it needs.

A network or module is ``model.safetensors`` beside a JSON record with its form and spec. Tensors are read one by one,
so a teaching pair in the middle of a ViT-H loads three of its 32 blocks and the meta model's blocks after its place.
Public files (kamanphoebe/m2mKD) and the packaged ViT-S/14 come in here as well, strictly checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.conversion.modules import assemble_stages, load_assembled, stage_of
from moe.errors import CheckpointError, NotFoundError, SpecError
from moe.keymaps.m2mkd import check_weights, from_official, read_module_file, read_trainer_file
from moe.models.vit_specs import ViTSpec, VMoESpec
from moe.models.vit_stages import ViTStages
from workers.context import Input
from workers.engines.torch import load_strict
from workers.m2mkd_settings import PACKAGED
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
    return {"form": form_of(module), "spec": module.spec.model_dump(mode="json")}  # type: ignore[union-attr,operator]


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
    local = {_renumbered(name, -start): value for name, value in state.items()}
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


def take_network(paths: Sequence[str], spec: ViTSpec, data_root: Path) -> State:
    """Weights of a whole ViT from one file, or from its modules' files in order.

    Args:
        paths: a trainer file, a ``.safetensors`` file, the packaged ViT, or one module file per stage.
        spec: of the whole network; the packaged ViT has no head, which stays fresh (and absent here).
        data_root: where unpacked packages may lie.

    Raises:
        CheckpointError: another family or size, or depths that do not add up to the file's.
        SpecError: neither one file nor one per stage.
    """
    if list(paths) == [PACKAGED]:
        return packaged_state(spec, data_root)
    if len(paths) == 1:
        state = read_trainer_file(_payload(paths[0]))
        check_weights(state, spec, paths[0])
        return state
    if len(paths) != len(spec.depths):
        raise SpecError(
            f"There are {len(paths)} files for depths {spec.depths}.", "Give one whole network, or one file per stage."
        )
    stages = [read_module_file(_payload(path), spec, index) for index, path in enumerate(paths)]
    return assemble_stages(stages, spec.depths).state


def take_modules(paths: Sequence[str]) -> list[State]:
    """Student modules of public files (or safetensors), in the order given, under this project's names."""
    found = []
    for path in paths:
        payload = _payload(path)
        state = payload.get("model", payload)
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} holds no state dict.", "Give the students' checkpoints.")
        found.append(from_official(state))
    return found


def packaged_state(spec: ViTSpec, data_root: Path) -> State:
    """The packaged ViT-S/14 with its layer scale folded into the weights after it, which is exact; without a head.

    Raises:
        CheckpointError: the spec is not a ViT-S/14 of 12 blocks.
    """
    from workers.onnx_weights import vit_small_state
    from workers.packaged_weights import require

    shape = (spec.dim, spec.heads, spec.depth, spec.patch_size, spec.channels, spec.mlp_ratio, spec.qkv_bias)
    if shape != (384, 6, 12, 14, 3, 4.0, True):
        raise CheckpointError(
            f"{PACKAGED} has width 384, 6 heads, 12 blocks and patches of 14 pixels; the settings say "
            f"{spec.dim}, {spec.heads}, {spec.depth} (depths {spec.depths}) and {spec.patch_size}.",
            "Depths must add up to 12, e.g. [3, 3, 3, 3].",
        )
    state = vit_small_state(require(PACKAGED, data_root), spec.image_size)
    for block in range(spec.depth):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = state.pop(f"blocks.{block}.{scale}.gamma")
            state[f"blocks.{block}.{layer}.weight"] = gamma[:, None] * state[f"blocks.{block}.{layer}.weight"]
            state[f"blocks.{block}.{layer}.bias"] = gamma * state[f"blocks.{block}.{layer}.bias"]
    return state


def load_whole(module: ViTStages, state: Mapping[str, Tensor], what: str) -> None:
    """Load a ViT's weights strictly; a head that ``state`` has not stays as it is.

    Raises:
        CheckpointError: tensors that do not fit, by name.
    """
    stages = assemble_stages([state], (module.spec.depth,))
    absent = () if any(name.startswith("head.") for name in state) else ("head.",)
    try:
        load_assembled(module, stages, allow_missing=absent)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error.message}", error.hint) from None


def _payload(path: str) -> Mapping[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise NotFoundError(f"There is no weights file {file}.", "Check the paths of this stage.")
    if file.suffix == ".safetensors":
        return load_tensors(file)
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged, or holds objects other than tensors, which are never executed here.",
            "Save the state dict alone, best as .safetensors.",
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a state dict.")
    return content


def _renumbered(name: str, by: int) -> str:
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(int(parts[1]) + by)
    return ".".join(parts)
