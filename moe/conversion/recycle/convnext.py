"""Recycling for ConvNeXts: a dense one becomes the starting weights of a C-JetMoE, or of a smaller dense ConvNeXt.

The residual stream changes its width from stage to stage, so each stage is cut like a small transformer: one list of
channels for its stream, a list of neurons for every block, and for blocks with slots a list of both for every expert.
Depthwise kernels, norms and layer scales follow the stream; the patch maps between stages follow both streams.
Source: MoE Jetpack (arXiv 2406.04801), section 3.2 and its C-JetMoE-F. Known differences: the public code holds no
ConvNeXt, so there is nothing to compare with; selections, options and draws are those of the transformers.

Shapes: E experts, k kept units, c channels of a stage, m neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.conversion.recycle.indices import uniform_list
from moe.conversion.recycle.layout import EXPERT_PARTS, FAMILIES, check_shape
from moe.conversion.recycle.lists import Wanted, Widths, recycling_lists
from moe.conversion.recycle.options import RecycleOptions
from moe.conversion.recycle.probe import Place
from moe.conversion.recycle.record import StatisticsRecord
from moe.conversion.recycle.recycle import Origin, layer_map
from moe.conversion.recycle.weights import State, UnitLists, gather, gather_stack
from moe.errors import CheckpointError, SpecError

CONVNEXT_PLACES: Mapping[str, Place] = {"norm2": Place("norm", "output"), "mlp_act": Place("mlp.act", "output")}
"""Where channels and neurons are judged, under the names that transformers have for them."""
CONVNEXT_BLOCKS = "stages.*.blocks"

_BLOCK = re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\.(.+)$")
_EXPERT = re.compile(rf"^mlp\.({'|'.join(FAMILIES)})\.({'|'.join(EXPERT_PARTS)})\.(weight|bias)$")
_AXES = {
    "gamma": "c", "conv_dw.weight": "c", "conv_dw.bias": "c", "norm.weight": "c", "norm.bias": "c",
    "mlp.fc1.weight": "mc", "mlp.fc1.bias": "m", "mlp.fc2.weight": "cm", "mlp.fc2.bias": "c",
}  # fmt: skip
_DOWN = {"downsample.0.weight": "p", "downsample.0.bias": "p", "downsample.1.weight": "cp", "downsample.1.bias": "c"}
_STEM = ("stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias")


@dataclass(frozen=True)
class StageSizes:
    """Width, hidden neurons and blocks of a stage."""

    dim: int
    hidden: int
    depth: int


@dataclass(frozen=True)
class StageLists:
    """Lists of a stage by its blocks from 0, and the predecessor's block of each."""

    experts: UnitLists
    dense: UnitLists
    layers: tuple[int, ...]


def read_convnext(state: Mapping[str, Tensor], what: str) -> tuple[StageSizes, ...]:
    """Sizes of a dense ConvNeXt, every tensor but those of the head's last map checked.

    Raises:
        CheckpointError: another family, blocks with channels first, or missing, unknown or wrongly shaped tensors.
    """
    depths = _depths(state)
    if not depths or "stem.0.weight" not in state:
        raise CheckpointError(
            f"The {what} is no ConvNeXt in timm's names. First names: {', '.join(list(state)[:4]) or 'none'}.",
            "Choose timm's convnext_*.",
        )
    sizes = []
    for stage, depth in enumerate(depths):
        first = state.get(f"stages.{stage}.blocks.0.mlp.fc1.weight")
        if first is None or first.ndim != 2:
            why = "is not there" if first is None else f"has shape {tuple(first.shape)}: the blocks keep channels first"
            raise CheckpointError(
                f"stages.{stage}.blocks.0.mlp.fc1.weight of the {what} {why}.",
                "Recycling knows ConvNeXts whose blocks keep channels last (conv_mlp=False), as convnext_tiny.",
            )
        sizes.append(StageSizes(first.shape[1], first.shape[0], depth))
    expected = _shapes(sizes, "stages.0.blocks.0.gamma" in state)
    unknown = [name for name in state if name not in expected and not name.startswith("head.")]
    missing = [name for name in expected if name not in state]
    if unknown or missing:
        kind, names = ("lacks", missing) if missing else ("has the unknown tensors", unknown)
        raise CheckpointError(f"The {what} {kind} {', '.join(names[:4])}.", "Is it a plain ConvNeXt, and whole?")
    for name, shape in expected.items():
        check_shape(state[name], (*shape, *state[name].shape[len(shape) :]), name, what)
    return tuple(sizes)


def check_convnext_sizes(
    predecessor: Mapping[str, Tensor], successor: Mapping[str, Tensor], depth: str = "first"
) -> list[tuple[Wanted, tuple[int, ...]]]:
    """What is wanted of every stage, and the predecessor's block of each; shapes are enough.

    Raises:
        CheckpointError: another family, or a successor that is larger.
    """
    source = read_convnext(predecessor, "predecessor")
    depths = _depths(successor)
    if len(depths) != len(source):
        raise CheckpointError(f"The successor has {len(depths)} stages, the predecessor {len(source)}.")
    return [
        (_wanted(successor, stage, own, sizes), layer_map(own, sizes.depth, depth))
        for stage, (sizes, own) in enumerate(zip(source, depths, strict=True))
    ]


def convnext_lists(
    predecessor: Mapping[str, Tensor],
    successor: Mapping[str, Tensor],
    options: RecycleOptions,
    *,
    generator: torch.Generator,
    statistics: StatisticsRecord | None = None,
) -> tuple[StageLists, ...]:
    """Which units every stage, block and expert of ``successor`` inherits.

    Args:
        predecessor: dense ConvNeXt, timm names.
        successor: freshly initialised; its shapes say how many experts of which size go where.
        options: how to choose.
        generator: source of all draws (CPU).
        statistics: of the predecessor, by block over all stages (:data:`CONVNEXT_PLACES`).

    Raises:
        CheckpointError: another family, or a successor that is larger.
        SpecError: options or statistics that do not fit.
    """
    found = check_convnext_sizes(predecessor, successor, options.depth)
    out, before = [], 0
    for (wanted, layers), depth in zip(found, _depths(predecessor), strict=True):
        record = None if statistics is None else _stage_record(statistics, [before + layer for layer in layers])
        experts, dense = recycling_lists(wanted, options, record, generator, dense=True)
        if dense is None:
            raise SpecError("No lists were drawn for the dense part.")
        out.append(StageLists(experts, dense, layers))
        before += depth
    return tuple(out)


def cut_convnext(
    predecessor: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    lists: Sequence[StageLists],
    *,
    donor: Mapping[str, Tensor] | None = None,
    inherit_norms: bool = False,
) -> tuple[State, dict[str, Origin]]:
    """Weights in the names and order of ``fresh``, and where each tensor is from.

    Args:
        predecessor: dense ConvNeXt.
        fresh: initialised network, with slots or dense; head, queries and temperatures keep its values.
        lists: of :func:`convnext_lists`.
        donor: dense ConvNeXt of the same widths and depths for everything but the experts.
        inherit_norms: queries' norms start as the block's norm.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    state: State = {}
    origin: dict[str, Origin] = {}
    for name, tensor in fresh.items():
        value = _expert(name, tensor, predecessor, lists)
        where: Origin = "predecessor"
        if value is None and not name.startswith("head.fc"):
            key = name.replace("mlp.slot_norm", "norm") if inherit_norms else name
            value = _dense(key, predecessor, lists) if donor is None else donor.get(key)
            where = "predecessor" if donor is None else "donor"
        if value is None:
            value, where = tensor, "fresh"
            if name.startswith(("stem", "head.norm")) or "downsample" in name or _dense_part(name):
                raise CheckpointError(
                    f"{name} {tuple(tensor.shape)} is not in the {'donor' if donor else 'predecessor'}."
                )
        check_shape(value, tuple(tensor.shape), name, where)
        state[name], origin[name] = value, where
    return state, origin


def _dense_part(name: str) -> bool:
    place = _BLOCK.match(name)
    return place is not None and place[3] in _AXES and place[3] != "gamma"


def _depths(state: Mapping[str, Tensor]) -> list[int]:
    """Blocks by stage; empty for another family."""
    places = {(int(m[1]), int(m[2])) for m in map(_BLOCK.match, state) if m is not None}
    count = 1 + max((stage for stage, _ in places), default=-1)
    return [len({block for stage, block in places if stage == own}) for own in range(count)]


def _shapes(sizes: Sequence[StageSizes], gamma: bool) -> dict[str, tuple[int, ...]]:
    """Lengths of the axes that follow units, by tensor."""
    out: dict[str, tuple[int, ...]] = dict.fromkeys(_STEM, (sizes[0].dim,))
    for stage, own in enumerate(sizes):
        length = {"c": own.dim, "m": own.hidden, "p": sizes[stage - 1].dim if stage else 0}
        for name, axes in _DOWN.items() if stage else ():
            out[f"stages.{stage}.{name}"] = tuple(length[axis] for axis in axes)
        for block in range(own.depth):
            for name, axes in _AXES.items():
                if gamma or name != "gamma":
                    out[f"stages.{stage}.blocks.{block}.{name}"] = tuple(length[axis] for axis in axes)
    return out


def _wanted(successor: Mapping[str, Tensor], stage: int, depth: int, sizes: StageSizes) -> Wanted:
    """Widths and counts of a stage of the successor."""
    dim = len(successor[f"stages.{stage}.blocks.0.norm.weight"])
    counts: dict[int, int] = {}
    widest: set[int] = set()
    for block in range(depth):
        prefix = f"stages.{stage}.blocks.{block}."
        stacks = [
            tensor
            for family in FAMILIES
            if (tensor := successor.get(f"{prefix}mlp.{family}.vit_fc1.weight")) is not None
        ]
        if stacks:
            counts[block] = sum(tensor.shape[0] for tensor in stacks)
            widest.add(max(tensor.shape[1] for tensor in stacks))
        else:
            widest.add(successor[f"{prefix}mlp.fc1.weight"].shape[0])
    if len(widest) > 1:
        raise CheckpointError(
            f"Stage {stage} of the successor has networks of {sorted(widest)} neurons; one is needed."
        )
    hidden = widest.pop()
    if dim > sizes.dim or hidden > sizes.hidden:
        raise CheckpointError(
            f"Stage {stage} of the successor (width {dim}, {hidden} neurons) is larger than the predecessor's (width "
            f"{sizes.dim}, {sizes.hidden} neurons).",
            "Recycling selects units, so choose a predecessor of at least that size.",
        )
    channel = Widths(sizes.dim, dim)
    return Wanted(
        channel, channel, Widths(sizes.hidden, hidden), depth, tuple(sorted(counts)), max(counts.values(), default=1)
    )


def _stage_record(record: StatisticsRecord, blocks: Sequence[int]) -> StatisticsRecord:
    """Statistics of some blocks, counted from 0; a ConvNeXt has no attention, so channels stand in for its rows."""
    values = {
        key: {i: own[block] for i, block in enumerate(blocks) if block in own} for key, own in record.values.items()
    }
    rows = {("attn_proj", metric): own for (place, metric), own in values.items() if place == "norm2"}
    return StatisticsRecord({**values, **rows})


def _expert(name: str, tensor: Tensor, predecessor: Mapping[str, Tensor], lists: Sequence[StageLists]) -> Tensor | None:
    """A stack of experts, or None for any other tensor."""
    place = _BLOCK.match(name)
    part = None if place is None else _EXPERT.match(place[3])
    if place is None or part is None:
        return None
    stage, block = int(place[1]), int(place[2])
    own = lists[stage]
    inner = f"{EXPERT_PARTS[part[2]]}.{part[3]}"
    source = predecessor.get(f"stages.{stage}.blocks.{own.layers[block]}.{inner}")
    if source is None or inner not in _AXES:
        raise CheckpointError(f"The predecessor has nothing for {name} {tuple(tensor.shape)}.")
    channel, neuron = own.experts.channel[block], own.experts.neuron[block]
    rows = slice(len(channel) - tensor.shape[0], None) if part[1] == "univ_experts" else slice(tensor.shape[0])
    neuron = neuron[rows]
    keep = tensor.shape[1 + _AXES[inner].index("m")] if "m" in _AXES[inner] else neuron.shape[1]
    if keep < neuron.shape[1]:
        neuron = neuron[:, uniform_list(neuron.shape[1], keep)]
    units = {"c": channel[rows], "m": neuron}
    return gather_stack(source, [units[axis] for axis in _AXES[inner]], tensor.dtype)


def _dense(name: str, predecessor: Mapping[str, Tensor], lists: Sequence[StageLists]) -> Tensor | None:
    """A tensor of the dense part, cut to the successor's streams; None when there is no such tensor."""
    place = _BLOCK.match(name)
    if place is not None:
        stage, block = int(place[1]), int(place[2])
        own = lists[stage]
        source = predecessor.get(f"stages.{stage}.blocks.{own.layers[block]}.{place[3]}")
        if source is None or place[3] not in _AXES:
            return None
        units = {"c": own.dense.channel[block], "m": own.dense.neuron[block]}
        return gather(source, [units[axis] for axis in _AXES[place[3]]])
    source = predecessor.get(name)
    if source is None:
        return None
    if name.startswith("stages."):
        stage = int(name.split(".")[1])
        units = {"c": lists[stage].dense.channel[0], "p": lists[stage - 1].dense.channel[0]}
        return gather(source, [units[axis] for axis in _DOWN[name.split(".", 2)[2]]])
    return gather(source, [lists[0 if name.startswith("stem") else -1].dense.channel[0]])
