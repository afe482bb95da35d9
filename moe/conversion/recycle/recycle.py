"""The whole recycling: a dense predecessor (and a dense donor) become the starting weights of an MoE successor.

Experts are cut out of the predecessor's feed-forward layers; every other tensor comes from a donor of the successor's
width or, without one, from the predecessor cut to that width. What neither has (router queries, temperatures, head)
stays as the successor was initialised.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2.

Parity: lists, gathers and stitching of the tool that made the released models, bit for bit under the same seed.
Differs: any predecessor and successor size and depth (the tool assumes 12 layers and takes widths from constants); a
tensor that should come from the donor but has another shape is an error, not silently left fresh; universal experts
are gathered at their final size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.conversion.recycle.indices import uniform_list
from moe.conversion.recycle.layout import (
    BLOCK_AXES,
    EXPERT_PARTS,
    DenseLayout,
    SuccessorLayout,
    block_name,
    check_shape,
    expert_name,
    read_dense,
    read_successor,
)
from moe.conversion.recycle.lists import Wanted, Widths, recycling_lists
from moe.conversion.recycle.options import RecycleOptions
from moe.conversion.recycle.record import StatisticsRecord
from moe.conversion.recycle.weights import State, UnitLists, gather_stack, select_dense
from moe.errors import CheckpointError, SpecError

Origin = Literal["predecessor", "donor", "fresh"]

_FRESH = re.compile(
    r"^(.*head.*|fc_norm\..*|attn_pool\..*|reg_token|blocks\.\d+\.ls[12]\.gamma|blocks\.\d+\.mlp\.(?!fc1|fc2|norm).*)$"
)
"""What a dense network of the same width need not have: head, norm after pooling, registers, layer scale, routers."""


@dataclass(frozen=True)
class Recycled:
    """A recycled successor.

    Attributes:
        state: its tensors, names and order of the successor.
        experts: lists of the experts, ``[E, k]`` by block; attention rows are drawn but used by nobody.
        dense: lists of the dense part when it was cut out of the predecessor, else None.
        origin: tensor name -> where it came from.
    """

    state: State
    experts: UnitLists
    dense: UnitLists | None
    origin: Mapping[str, Origin]


def recycle(
    predecessor: Mapping[str, Tensor],
    successor: Mapping[str, Tensor],
    options: RecycleOptions | None = None,
    *,
    generator: torch.Generator,
    statistics: StatisticsRecord | None = None,
    donor: Mapping[str, Tensor] | None = None,
) -> Recycled:
    """Starting weights of ``successor``.

    Args:
        predecessor: dense vision transformer, timm names.
        successor: freshly initialised MoE vision transformer; its shapes say how many experts of which size go where.
        options: how to choose; by default in proportion to the L2 statistic.
        generator: source of all draws (CPU).
        statistics: of the predecessor, for all selections but random, uniform and copy.
        donor: dense vision transformer of the successor's width for everything but the experts.

    Raises:
        CheckpointError: another family, missing or wrongly shaped tensors, or a successor larger than the predecessor.
        SpecError: options that do not fit.
        DataError: statistics that do not fit.
    """
    chosen = options or RecycleOptions()
    target = read_successor(successor)
    source = read_dense(predecessor, "predecessor")
    layers = layer_map(target.depth, source.depth, chosen.depth)
    mapped = with_layers(predecessor, layers)
    wanted = _wanted(source, target)
    record = None if statistics is None else _record_with_layers(statistics, layers)
    experts, dense = recycling_lists(wanted, chosen, record, generator, dense=donor is None)
    if dense is not None:
        rest, origin = select_dense(mapped, dense, target.moe_blocks), "predecessor"
    else:
        rest, origin = _checked_donor(donor or {}, target), "donor"
    rest = with_inherited_norms(rest, target) if chosen.inherit_norms else rest
    check_rest(successor, rest, origin)
    cut = gather_experts(mapped, successor, target, experts)
    state = stitch(successor, rest, cut)
    return Recycled(state, experts, dense, {name: _origin(name, rest, cut, successor, origin) for name in state})


def check_sizes(predecessor: Mapping[str, Tensor], successor: Mapping[str, Tensor], depth: str = "first") -> None:
    """Whether ``successor`` can be cut out of ``predecessor``; shapes are enough, so both may lie on ``meta``.

    Raises:
        CheckpointError: another family, wrongly shaped tensors, or a successor that is larger.
    """
    target, source = read_successor(successor), read_dense(predecessor, "predecessor")
    layer_map(target.depth, source.depth, depth)
    _wanted(source, target)


def gather_experts(
    predecessor: Mapping[str, Tensor], successor: Mapping[str, Tensor], target: SuccessorLayout, lists: UnitLists
) -> State:
    """All expert tensors of the successor, each gathered once at its final size and type.

    Args:
        predecessor: dense tensors, one block per block of the successor.
        successor: gives the types.
        target: groups of experts; the experts of a group with fewer neurons than the block's first group keep an
            evenly spaced share of their lists.
        lists: channels and neurons, ``[E, k]`` by block, experts in the order of the groups.

    Raises:
        CheckpointError: the predecessor lacks a tensor (gated experts need a gated predecessor).
    """
    out: State = {}
    for block in target.moe_blocks:
        offset = 0
        for group in target.of_block(block):
            rows = slice(offset, offset + group.count)
            offset += group.count
            neuron = lists.neuron[block][rows]
            if group.hidden < neuron.shape[1]:
                neuron = neuron[:, uniform_list(neuron.shape[1], group.hidden)]
            units = {"c": lists.channel[block][rows], "m": neuron}
            for name in group.names:
                parts = expert_name(name)
                inner = f"{EXPERT_PARTS[parts[2]]}.{parts[3]}" if parts else name
                dense = f"blocks.{block}.{inner}"
                if dense not in predecessor:
                    raise CheckpointError(
                        f"The successor's {name} {tuple(successor[name].shape)} needs {dense}, which the predecessor "
                        "does not have.",
                        "Gated experts need a gated predecessor, and biases need biases.",
                    )
                axes = [units[axis] for axis in BLOCK_AXES[inner]]
                out[name] = gather_stack(predecessor[dense], axes, successor[name].dtype)
    return out


def stitch(
    target: Mapping[str, Tensor], dense: Mapping[str, Tensor], experts: Mapping[str, Tensor], *, check: bool = True
) -> State:
    """Names and order of ``target``; expert tensors from ``experts``, others of equal shape from ``dense``.

    Args:
        target: tensors of the successor; what the other two lack keeps its value.
        dense: dense network of the same width.
        experts: tensors whose name contains ``experts``.
        check: Differs: an expert tensor of another shape is an error. False is the public code: it is taken as it is.

    Raises:
        CheckpointError: see ``check``.
    """
    out: State = {}
    for name, tensor in target.items():
        if "experts" in name:
            out[name] = experts.get(name, tensor)
            if check:
                check_shape(out[name], tuple(tensor.shape), name, "recycled experts")
        else:
            given = dense.get(name)
            out[name] = given if given is not None and given.shape == tensor.shape else tensor
    return out


def layer_map(layers: int, available: int, how: str = "first") -> tuple[int, ...]:
    """Predecessor layer of every successor layer.

    Args:
        layers: layers of the successor.
        available: layers of the predecessor, at least as many.
        how: ``first`` layers, or ``even``: evenly spaced ones, first and last included.

    Raises:
        CheckpointError: the successor is deeper.
        SpecError: another ``how``.
    """
    if layers > available:
        raise CheckpointError(
            f"The successor has {layers} blocks, the predecessor only {available}.", "Use a deeper predecessor."
        )
    if how == "first":
        return tuple(range(layers))
    if how != "even":
        raise SpecError(f"There is no layer choice {how!r}.", "Allowed: even, first.")
    return tuple(uniform_list(available, layers).tolist())


def _wanted(source: DenseLayout, target: SuccessorLayout) -> Wanted:
    """Widths and counts; refuses what cannot be cut out of the predecessor."""
    widest = {block: target.of_block(block)[0].hidden for block in target.moe_blocks}
    hidden = next(iter(widest.values()))
    for block, own in widest.items():
        if own != hidden:
            raise CheckpointError(f"The first experts of block {block} have {own} neurons, others have {hidden}.")
    for group in target.groups:
        if group.hidden > hidden:
            raise CheckpointError(
                f"blocks.{group.block}.mlp.{group.family} has {group.hidden} neurons per expert, more than the "
                f"{hidden} of the block's first experts."
            )
    if target.dim > source.dim or hidden > source.hidden:
        raise CheckpointError(
            f"The successor (width {target.dim}, {hidden} neurons per expert) is larger than the predecessor (width "
            f"{source.dim}, {source.hidden} neurons).",
            "Recycling selects units, so choose a predecessor of at least that size.",
        )
    if target.dim * source.attention % source.dim:
        raise CheckpointError(
            f"Width {target.dim} of {source.dim} does not divide the predecessor's {source.attention} attention rows.",
        )
    counts = {block: sum(group.count for group in target.of_block(block)) for block in target.moe_blocks}
    return Wanted(
        Widths(source.dim, target.dim),
        Widths(source.attention, target.dim * source.attention // source.dim),
        Widths(source.hidden, hidden),
        target.depth,
        target.moe_blocks,
        max(counts.values()),
    )


def with_layers(state: Mapping[str, Tensor], layers: tuple[int, ...]) -> State:
    """The network made of the given blocks, renumbered."""
    out: State = {name: tensor for name, tensor in state.items() if block_name(name) is None}
    for new, old in enumerate(layers):
        prefix = f"blocks.{old}."
        out |= {f"blocks.{new}.{name.removeprefix(prefix)}": t for name, t in state.items() if name.startswith(prefix)}
    return out


def _record_with_layers(record: StatisticsRecord, layers: tuple[int, ...]) -> StatisticsRecord:
    return StatisticsRecord(
        {key: {new: own[old] for new, old in enumerate(layers) if old in own} for key, own in record.values.items()}
    )


def _checked_donor(donor: Mapping[str, Tensor], target: SuccessorLayout) -> State:
    layout = read_dense(donor, "donor")
    if layout.dim != target.dim:
        raise CheckpointError(
            f"The donor has width {layout.dim}, the successor {target.dim}.",
            "Use a donor of the successor's width, or none: the predecessor is cut to it then.",
        )
    return dict(donor)


def with_inherited_norms(rest: State, target: SuccessorLayout) -> State:
    """``slot_norm`` as the norm before the layer, ``fc_norm`` as the final norm."""
    out = dict(rest)
    for kind in ("weight", "bias"):
        for block in target.moe_blocks:
            if f"blocks.{block}.norm2.{kind}" in rest:
                out[f"blocks.{block}.mlp.slot_norm.{kind}"] = rest[f"blocks.{block}.norm2.{kind}"]
        if f"norm.{kind}" in rest:
            out[f"fc_norm.{kind}"] = rest[f"norm.{kind}"]
    return out


def check_rest(successor: Mapping[str, Tensor], rest: Mapping[str, Tensor], origin: str) -> None:
    """Every tensor that a dense network has is there in the successor's shape."""
    for name, tensor in successor.items():
        if "experts" in name or _FRESH.match(name):
            continue
        if name not in rest:
            raise CheckpointError(f"The successor's {name} {tuple(tensor.shape)} is not in the {origin}.")
        if rest[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(rest[name].shape)} in the {origin}, but {tuple(tensor.shape)} in the "
                "successor.",
                "Resize position table and patch embedding before recycling." if name[:1] == "p" else "",
            )


def _origin(
    name: str, rest: Mapping[str, Tensor], experts: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str
) -> Origin:
    if name in experts:
        return "predecessor"
    taken = "experts" not in name and name in rest and rest[name].shape == target[name].shape
    return ("donor" if source == "donor" else "predecessor") if taken else "fresh"
