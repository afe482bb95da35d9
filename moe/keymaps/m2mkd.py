"""Names of m2mKD's public ViT, V-MoE and module files, in both directions.

The reference (``kamanphoebe/m2mKD``, on Deep Incubation and fastmoe) writes

- trainer files: ``model`` (a state dict in which every block weight stands twice, as ``blocks.<g>.*`` and as
  ``stages.<s>.blocks.<l>.*``), ``model_stages`` and optimiser state;
- teacher modules: ``model_name``, ``block_index``, ``block_state_dict`` (stage-local names), ``divided_depths``;
- experts: ``moe.gate.gate.*``, ``moe.experts.<e>.{htoh4,h4toh}.{weight,bias}`` of shape ``[1, out, in]``, ``[1, out]``;
  in older files fused over the experts, ``moe.experts.{htoh4,h4toh}.*`` of shape ``[E, out, in]``.

Here a V-MoE holds stacked experts, ``mlp.experts.{w1,b1,w2,b2}``, and a gate ``mlp.gate.*``. The state dicts of neural
attentive circuits need no other names (``moe.models.nac``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.conversion.modules import assemble_stages, split_state
from moe.errors import CheckpointError, nearest
from moe.models.vit_specs import ViTSpec

State = dict[str, Tensor]

EXPERT_PARTS = {"htoh4.weight": "w1", "htoh4.bias": "b1", "h4toh.weight": "w2", "h4toh.bias": "b2"}
"""fastmoe's name within an expert -> name of the stacked tensor."""

_STAGE = re.compile(r"stages\.(\d+)\.(.+)")
_ONE_EXPERT = re.compile(r"(.*)moe\.experts\.(\d+)\.(\w+\.\w+)")
_FUSED = re.compile(r"(.*)moe\.experts\.([a-z]\w*\.\w+)")
_OURS = re.compile(r"(.*)mlp\.(gate|experts)\.(\w+)")


def from_official(state: Mapping[str, Tensor]) -> State:
    """A public ViT, V-MoE, student or module state dict under this project's names.

    Args:
        state: with plain names, ``stages.*`` names, or both.

    Returns:
        Plain names; experts are stacked (copies), everything else is shared with ``state``.

    Raises:
        CheckpointError: the two copies of a weight differ, experts are missing or of different shapes, or a tensor of
            an expert has an unknown name.
    """
    result: State = {}
    singles: dict[str, dict[int, Tensor]] = {}
    for name, value in _plain(state).items():
        if found := _ONE_EXPERT.fullmatch(name):
            singles.setdefault(f"{found[1]}mlp.experts.{_part(name, found[3])}", {})[int(found[2])] = value
        elif found := _FUSED.fullmatch(name):
            result[f"{found[1]}mlp.experts.{_part(name, found[2])}"] = value
        else:
            result[re.sub(r"(^|\.)moe\.gate\.(gate\.)?", r"\1mlp.gate.", name)] = value
    for target, experts in singles.items():
        result[target] = _stacked(target, experts)
    return result


def to_official(state: Mapping[str, Tensor], depths: Sequence[int] | None = None) -> State:
    """Inverse of :func:`from_official`: one tensor per expert, and both copies of every weight if ``depths`` is given.

    Args:
        state: this project's names.
        depths: blocks of each stage, for the ``stages.<s>.*`` copies.

    Raises:
        CheckpointError: ``depths`` do not fit the blocks.
    """
    plain: State = {}
    for name, value in state.items():
        names = official_names(name, value.shape[0] if value.ndim else 1)
        if len(names) == 1 and "experts" not in names[0]:
            plain[names[0]] = value
        else:
            plain |= {new: value[e : e + 1] for e, new in enumerate(names)}
    if depths is None:
        return plain
    stages = split_state(plain, depths)
    return plain | {f"stages.{i}.{name}": value for i, stage in enumerate(stages) for name, value in stage.items()}


def official_names(name: str, num_experts: int) -> list[str]:
    """The public names of one of this project's tensors: one per expert for stacked weights, else a single one."""
    found = _OURS.fullmatch(name)
    if not found:
        return [name]
    prefix, kind, leaf = found[1], found[2], found[3]
    if kind == "gate":
        return [f"{prefix}moe.gate.{'gate.' if leaf in ('weight', 'bias') else ''}{leaf}"]
    parts = {ours: theirs for theirs, ours in EXPERT_PARTS.items()}
    return [f"{prefix}moe.experts.{e}.{parts[leaf]}" for e in range(num_experts)]


def all_official_names(spec: ViTSpec) -> list[str]:
    """Every name in the public state dict of a whole dense ViT, sorted."""
    from moe.models.vit_stages import ViTStages

    with torch.device("meta"):
        state = ViTStages(spec).state_dict()
    return sorted(to_official(state, spec.depths))


def read_trainer_file(payload: Mapping[str, Any]) -> State:
    """The weights of a trainer file (``model``), or of a bare state dict, under this project's names.

    Raises:
        CheckpointError: it holds no weights; as :func:`from_official`.
    """
    state = payload.get("model", payload)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"This is no trainer file: its keys are {', '.join(map(str, list(payload)[:5])) or 'none'}.",
            "Expected 'model' with a state dict, or a state dict.",
        )
    return from_official(state)


def write_module_files(state: Mapping[str, Tensor], model_name: str, depths: Sequence[int]) -> list[dict[str, Any]]:
    """A teacher as public module files, one payload per stage.

    Args:
        state: a whole dense ViT.
        model_name: e.g. ``vit_huge_patch14_224``.
        depths: blocks of each stage.

    Raises:
        CheckpointError: the depths do not add up to the network's.
    """
    return [
        {"model_name": model_name, "block_index": i, "block_state_dict": stage, "divided_depths": list(depths)}
        for i, stage in enumerate(split_state(state, depths))
    ]


def read_module_file(payload: Mapping[str, Any], spec: ViTSpec, index: int | None = None) -> State:
    """The weights of one public teacher module, checked against the stage it should be.

    Args:
        payload: the file.
        spec: the whole teacher.
        index: stage that is wanted; whatever the file says when left out.

    Raises:
        CheckpointError: another kind of file, another stage, other depths, or tensors that do not fit, by name.
    """
    missing = [key for key in ("block_index", "block_state_dict", "divided_depths") if key not in payload]
    if missing:
        raise CheckpointError(
            f"This is no teacher module file: {', '.join(missing)} missing, it has {', '.join(map(str, payload))}.",
            "Give a file of split_teacher, or a whole teacher to be split.",
        )
    found, depths = int(payload["block_index"]), tuple(payload["divided_depths"])
    if depths != spec.depths or (index is not None and found != index):
        raise CheckpointError(
            f"The file holds module {found} of depths {depths}, wanted is module {index} of depths {spec.depths}.",
            "Use the file of this position, and the depths the teacher was split by.",
        )
    state: State = dict(payload["block_state_dict"])
    check_weights(state, spec.stage(found), f"Teacher module {found}")
    return state


def check_weights(state: Mapping[str, Tensor], spec: ViTSpec, what: str) -> None:
    """Compare names and shapes with the network that ``spec`` describes.

    Raises:
        CheckpointError: names missing, unexpected and wrongly shaped tensors (transposed ones as such).
    """
    from moe.models.vmoe import build_vit

    with torch.device("meta"):
        own = {name: tuple(value.shape) for name, value in build_vit(spec).state_dict().items()}
    complaints = [f"{name} is missing" for name in own if name not in state]
    complaints += [f"{name} is unexpected" for name in state if name not in own]
    for name, shape in own.items():
        seen = tuple(state[name].shape) if name in state else shape
        if seen != shape:
            transposed = " (transposed)" if seen == shape[::-1] else ""
            complaints.append(f"{name} is {seen} instead of {shape}{transposed}")
    if complaints:
        more = f"; and {len(complaints) - 6} more" if len(complaints) > 6 else ""
        raise CheckpointError(
            f"{what} does not fit: {'; '.join(complaints[:6])}{more}.", "Check model name, depths and kind of file."
        )


def _plain(state: Mapping[str, Tensor]) -> State:
    """Names without ``stages.``; both copies of a weight must agree."""
    plain = {name: value for name, value in state.items() if not _STAGE.fullmatch(name)}
    stages: dict[int, State] = {}
    for name, value in state.items():
        if found := _STAGE.fullmatch(name):
            stages.setdefault(int(found[1]), {})[found[2]] = value
    if not stages:
        return plain
    if sorted(stages) != list(range(len(stages))):
        raise CheckpointError(f"Stages {sorted(stages)} are not numbered from 0 without gaps.", "Is the file complete?")
    parts = [stages[i] for i in range(len(stages))]
    depths = [len({name.split(".")[1] for name in part if name.startswith("blocks.")}) for part in parts]
    blocks = range(sum(depths))
    copies = assemble_stages(parts, depths, blocks, blocks).state
    for name, value in copies.items():
        if name in plain and not torch.equal(plain[name], value):
            raise CheckpointError(f"The two copies of {name} in this file differ.", "The file is damaged.")
    return {**copies, **plain}


def _part(name: str, leaf: str) -> str:
    if leaf not in EXPERT_PARTS:
        raise CheckpointError(f"Tensor {name!r} is not part of a fastmoe expert.", nearest(leaf, EXPERT_PARTS))
    return EXPERT_PARTS[leaf]


def _stacked(target: str, experts: Mapping[int, Tensor]) -> Tensor:
    """One tensor ``[E, ...]`` from single experts ``[1, ...]``."""
    if sorted(experts) != list(range(len(experts))):
        raise CheckpointError(
            f"{target}: experts {sorted(experts)} are not numbered from 0 without gaps.", "An expert is missing."
        )
    shapes = {tuple(value.shape) for value in experts.values()}
    if len(shapes) != 1 or next(iter(shapes))[:1] != (1,):
        raise CheckpointError(f"{target}: experts have shapes {sorted(shapes)}.", "Expected [1, out, in] or [1, out].")
    return torch.cat([experts[e] for e in range(len(experts))])
