"""Gathers: the tensors of a smaller network, cut out of a larger one by index lists.

Pure copies of rows and columns, bit for bit; no arithmetic. Experts are gathered directly into their final, stacked
tensors, so that no full-size copy per expert ever exists.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2; names of the public checkpoints.

Shapes: D width, H hidden, E experts, k kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.conversion.recycle.indices import Lists
from moe.conversion.recycle.layout import BLOCK_AXES, DenseLayout, block_name, is_head, read_dense, stem_axis
from moe.errors import CheckpointError, SpecError, nearest

State = dict[str, Tensor]


@dataclass(frozen=True)
class UnitLists:
    """Lists for the three kinds of units: channels, attention rows, hidden neurons; by layer."""

    channel: Lists
    attention: Lists
    neuron: Lists

    def axes(self, layer: int, expert: int | None, attention: int) -> dict[str, Tensor]:
        """Axis letter of :data:`~moe.conversion.recycle.layout.BLOCK_AXES` -> its units, of one expert if given."""
        c, a, m = (self._of(lists, layer, expert) for lists in (self.channel, self.attention, self.neuron))
        return {"c": c, "a": a, "m": m, "q": torch.cat([a, a + attention, a + 2 * attention])}

    @staticmethod
    def _of(lists: Lists, layer: int, expert: int | None) -> Tensor:
        if layer not in lists:
            raise SpecError(f"There is no index list for layer {layer}; there are lists for {sorted(lists)}.")
        return lists[layer] if expert is None else lists[layer][expert]


def gather(tensor: Tensor, units: Sequence[Tensor]) -> Tensor:
    """The sub-tensor of ``units[i]`` along axis i, a copy."""
    for axis, rows in enumerate(units):
        tensor = tensor.index_select(axis, rows)
    return tensor


def gather_stack(tensor: Tensor, units: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """One sub-tensor per expert, stacked: ``[E, k0, k1, ...]`` from lists ``[E, k0]``, ``[E, k1]``, ...

    Args:
        tensor: one or two axes.
        units: a list per expert and axis.
        dtype: type of the result; None keeps the tensor's.
    """
    experts = units[0].shape[0]
    out = tensor.new_empty((experts, *(rows.shape[1] for rows in units)), dtype=dtype)
    for expert in range(experts):
        out[expert] = gather(tensor, [rows[expert] for rows in units])
    return out


def select_weights(
    state: Mapping[str, Tensor],
    dense: UnitLists,
    experts: UnitLists,
    moe_blocks: Sequence[int],
    *,
    unit: str = "mlp",
    gated: bool = False,
    merge_qkv: bool = False,
) -> State:
    """A smaller network: its dense part by the lists ``dense``, its experts by the lists ``experts``.

    Args:
        state: tensors of the predecessor, timm names; a head is left out.
        dense: lists ``[k]`` by layer. The stem, and both norms of blocks with experts, use the channels of layer 0.
        experts: lists ``[E, k]`` for the layers of ``moe_blocks``.
        moe_blocks: blocks whose unit becomes experts.
        unit: ``mlp``: the feed-forward layer; ``block``: everything in the block.
        gated: the feed-forward layers are gated (fc1_g, fc1_x), so that fc2 takes the gated name as well.
        merge_qkv: unit ``block`` only: join separate query, key and value projections; a missing bias counts as 0.

    Returns:
        Tensors in the predecessor's order, experts as ``blocks.i.mlp.experts.vit_fc1.weight`` (unit ``mlp``),
        ``blocks.i.mlp.glu_experts.eva_fc1_g.weight`` (gated) or ``blocks.i.experts....`` (unit ``block``).

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape than the rest of the network.
        SpecError: another unit, merge_qkv with unit ``mlp``, or missing lists.
    """
    if unit not in ("mlp", "block"):
        raise SpecError(f"There is no unit {unit!r}.", nearest(unit, ("mlp", "block")))
    if merge_qkv and unit != "block":
        raise SpecError("merge_qkv joins the projections of expert blocks, but unit is 'mlp'.", "Use unit='block'.")
    layout = read_dense(state, "predecessor")
    chosen = set(moe_blocks)
    out: State = {}
    for name, tensor in state.items():
        place = block_name(name)
        if is_head(name):
            continue
        if place is not None and place[0] in chosen and (unit == "block" or place[1].startswith("mlp.")):
            block, inner = place
            out[expert_key(block, inner, unit, gated)] = _expert_stack(tensor, inner, experts, block, layout)
        else:
            out[name] = _dense_tensor(name, tensor, dense, chosen, layout)
    return _merged(out, sorted(chosen)) if merge_qkv else out


def select_dense(state: Mapping[str, Tensor], dense: UnitLists, moe_blocks: Sequence[int]) -> State:
    """The dense part of :func:`select_weights` alone: no head, no feed-forward layers of ``moe_blocks``.

    Raises:
        CheckpointError: as :func:`select_weights`.
        SpecError: a list is missing.
    """
    layout = read_dense(state, "predecessor")
    chosen = set(moe_blocks)
    out: State = {}
    for name, tensor in state.items():
        place = block_name(name)
        moved = place is not None and place[0] in chosen and place[1].startswith("mlp.")
        if not is_head(name) and not moved:
            out[name] = _dense_tensor(name, tensor, dense, chosen, layout)
    return out


def expert_key(block: int, inner: str, unit: str, gated: bool) -> str:
    """Public name of an expert tensor, from the name inside the dense block."""
    module, kind = inner.rsplit(".", 1)
    parts = {
        "mlp.fc1": "vit_fc1",
        "mlp.fc2": "eva_fc2" if gated else "vit_fc2",
        "mlp.fc1_g": "eva_fc1_g",
        "mlp.fc1_x": "eva_fc1_x",
        "mlp.norm": "eva_norm",
    }
    if unit == "block":
        moved = {"norm1": "attn.norm1", "norm2": "mlp.norm2"}
        new = f"mlp.{parts[module]}" if module in parts else moved.get(module, module)
        return f"blocks.{block}.experts.{new}.{kind}"
    family = "glu_experts" if parts[module].startswith("eva") else "experts"
    return f"blocks.{block}.mlp.{family}.{parts[module]}.{kind}"


def stack_sizes(
    state: Mapping[str, Tensor],
    lists: Mapping[str, Lists],
    moe_layers: Sequence[int],
) -> State:
    """Experts of several sizes beside each other, of the predecessor's width (simplified tool).

    Args:
        state: tensors of the predecessor; all but the feed-forward layers of ``moe_layers`` pass through.
        lists: size name (:func:`size_name`) -> layer -> neurons ``[E, k]``.
        moe_layers: layers whose feed-forward layer becomes experts.

    Returns:
        The predecessor without those feed-forward layers, then ``blocks.l.mlp.experts.<size>.fc1.weight``
        ``[E, k, D]``, ``fc2.weight`` ``[E, D, k]``, ``fc1.bias`` ``[E, k]``, ``fc2.bias`` ``[E, D]``.

    Raises:
        CheckpointError: a feed-forward tensor is missing or of another shape.
        SpecError: a list is missing.
    """
    read_dense(state, "predecessor")
    taken = {f"blocks.{layer}.mlp.{part}" for layer in moe_layers for part in _MLP}
    absent = sorted(taken - state.keys())
    if absent:
        raise CheckpointError(f"The predecessor lacks {', '.join(absent[:4])}.", "Gated layers have no such form.")
    out = {name: tensor for name, tensor in state.items() if name not in taken}
    for size, layers in lists.items():
        for layer in moe_layers:
            if layer not in layers:
                raise SpecError(f"Size {size!r} has no index list for layer {layer}.")
            source, target = f"blocks.{layer}.mlp", f"blocks.{layer}.mlp.experts.{size}"
            for part in _MLP:
                out[f"{target}.{part}"] = _neurons(state[f"{source}.{part}"], part, layers[layer])
    return out


def size_name(ratio: float) -> str:
    """Name of an expert size: two decimals, ``p`` for the point (0.25 -> ``0p25``)."""
    return f"{ratio:.2f}".replace(".", "p")


_MLP = ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")


def _neurons(tensor: Tensor, part: str, neurons_Ek: Tensor) -> Tensor:
    """Rows, columns or (fc2.bias) everything, per expert."""
    if part == "fc2.bias":
        return tensor.expand(neurons_Ek.shape[0], -1).clone()
    if part == "fc2.weight":
        every = torch.arange(tensor.shape[0]).expand(neurons_Ek.shape[0], -1)
        return gather_stack(tensor, [every, neurons_Ek])
    return tensor[neurons_Ek]


def _dense_tensor(name: str, tensor: Tensor, dense: UnitLists, chosen: set[int], layout: DenseLayout) -> Tensor:
    """A tensor that no expert owns. Parity: both norms of a block with experts take the channels of layer 0."""
    place = block_name(name)
    if place is None:
        axis = stem_axis(name)
        return tensor.index_select(-1 if axis is None else axis, dense.axes(0, None, layout.attention)["c"])
    block, inner = place
    units = dense.axes(block, None, layout.attention)
    if block in chosen and inner.startswith("norm"):
        units["c"] = dense.axes(0, None, layout.attention)["c"]
    return gather(tensor, [units[axis] for axis in BLOCK_AXES[inner]])


def _expert_stack(tensor: Tensor, inner: str, lists: UnitLists, block: int, layout: DenseLayout) -> Tensor:
    experts = len(lists.neuron.get(block, ()))
    if experts == 0:
        raise SpecError(f"There is no expert list for layer {block}.")
    axes = [lists.axes(block, expert, layout.attention) for expert in range(experts)]
    return gather_stack(tensor, [torch.stack([units[axis] for units in axes]) for axis in BLOCK_AXES[inner]])


def _merged(state: State, blocks: Sequence[int]) -> State:
    """Query, key and value projections of expert blocks as one ``qkv``."""
    for block in blocks:
        prefix = f"blocks.{block}.experts.attn"
        parts = [f"{prefix}.{part}_proj" for part in "qkv"]
        if f"{parts[0]}.weight" not in state:
            raise CheckpointError(f"{parts[0]}.weight is missing: the projections of block {block} are not separate.")
        weights = [state.pop(f"{part}.weight") for part in parts]
        biases = [
            state.pop(f"{part}.bias", weight.new_zeros(weight.shape[:2]))
            for part, weight in zip(parts, weights, strict=True)
        ]
        state[f"{prefix}.qkv.weight"] = torch.cat(weights, dim=1)
        state[f"{prefix}.qkv.bias"] = torch.cat(biases, dim=1)
    return state
