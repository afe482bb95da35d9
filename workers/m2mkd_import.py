"""Weights of other people as the start of a phase of m2mKD: whole networks, modules, finished models.

Public files (kamanphoebe/m2mKD), safetensors and the packaged ViT-S/14, strictly checked: what does not fit is named.
Only tensors are read; nothing in a file is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.conversion.modules import assemble_stages, load_assembled
from moe.errors import CheckpointError, NotFoundError, SpecError
from moe.keymaps.m2mkd import check_weights, from_official, read_module_file, read_trainer_file
from moe.models.vit_specs import ViTSpec
from moe.models.vit_stages import ViTStages
from workers.m2mkd_files import State, form_of, renumbered
from workers.m2mkd_settings import PACKAGED, PACKAGED_DEPTH, packaged_problem
from workers.modelfile import load_tensors


def take_network(
    paths: Sequence[str], spec: ViTSpec, data_root: Path, blocks: Sequence[int] = (), fresh_head: bool = False
) -> State:
    """Weights of a whole ViT from one file, or from its modules' files in order.

    Args:
        paths: a trainer file, a ``.safetensors`` file, the packaged ViT, or one module file per stage.
        spec: of the whole network; the packaged ViT has no head, which stays fresh (and absent here).
        data_root: where unpacked packages may lie.
        blocks: of a deeper network in one file, those that become the blocks of ``spec``; empty takes them as they are.
        fresh_head: leave a file's head out, whatever its classes.

    Raises:
        CheckpointError: another family or size, or depths that do not add up to the file's.
        SpecError: neither one file nor one per stage.
    """
    if list(paths) == [PACKAGED] and not blocks:
        return packaged_state(spec, data_root)
    if len(paths) == 1:
        state = _some_blocks(paths[0], spec, data_root, blocks) if blocks else read_trainer_file(_payload(paths[0]))
        return state if paths[0] == PACKAGED else _checked(state, spec, paths[0], fresh_head)
    if len(paths) != len(spec.depths):
        raise SpecError(
            f"There are {len(paths)} files for depths {spec.depths}.", "Give one whole network, or one file per stage."
        )
    stages = [read_module_file(_payload(path), spec, index) for index, path in enumerate(paths)]
    return assemble_stages(stages, spec.depths).state


def _some_blocks(path: str, spec: ViTSpec, data_root: Path, blocks: Sequence[int]) -> State:
    """A shallow ViT from blocks of a deeper one, in the order given; embedding, norm and head are the deep one's."""
    if path == PACKAGED:
        state = packaged_state(spec.model_copy(update={"depths": (PACKAGED_DEPTH,)}), data_root)
    else:
        state = read_trainer_file(_payload(path))
    present = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if len(blocks) != spec.depth or not set(blocks) <= present:
        raise CheckpointError(
            f"Blocks {list(blocks)} of {path}, which has {len(present)}, for a network of {spec.depth} blocks.",
            "Name one block of the file for each block of the network, counted from 0.",
        )
    chosen = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    for place, block in enumerate(blocks):
        of_block = f"blocks.{block}."
        chosen |= {renumbered(n, place - block): v.clone() for n, v in state.items() if n.startswith(of_block)}
    return chosen


def _checked(state: State, spec: ViTSpec, path: str, fresh_head: bool) -> State:
    """A whole network's weights, without the head if it is to stay fresh."""
    own_head = {name: value for name, value in state.items() if name.startswith("head.")}
    if fresh_head and "head.weight" in own_head and own_head["head.weight"].ndim == 2:
        check_weights(state, spec.model_copy(update={"num_classes": len(own_head["head.weight"])}), path)
        return {name: value for name, value in state.items() if name not in own_head}
    check_weights(state, spec, path)
    return state


def load_modular(network: nn.Module, paths: Sequence[str], fresh_head: bool) -> None:
    """Load a finished V-MoE or circuit from one file, in place, strictly but for a head that stays fresh.

    Raises:
        CheckpointError: another network, damaged, or tensors that do not fit, by name.
        SpecError: several files, which are student modules and need to be assembled.
    """
    if len(paths) != 1:
        raise SpecError(
            f"A finished model is one file, {len(paths)} are given.", "Student modules go to m2mkd_assemble (`files`)."
        )
    payload = _payload(paths[0])
    if form_of(network) == "circuit":
        from moe.models.nac.checkpoints import load_strictly
        from moe.models.nac.checkpoints import read_trainer_file as read_circuit

        head, state = "output_tokenizer.to_logits.", read_circuit(payload)
        kept = [name for name in network.state_dict() if fresh_head and name.startswith(head)]
        given = {name: value for name, value in state.items() if name not in kept}
        load_strictly(network, given, f"{paths[0]} is not of this circuit", optional=kept)
        return
    spec: ViTSpec = network.spec  # type: ignore[assignment]
    state = _checked(read_trainer_file(payload), spec, paths[0], fresh_head)
    network.load_state_dict({**network.state_dict(), **state})


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

    problem = packaged_problem(spec)
    if problem:
        raise CheckpointError(problem, "Depths must add up to 12, e.g. [3, 3, 3, 3].")
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
