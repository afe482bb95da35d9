"""Reads the sizes of a dense vision transformer and of an MoE successor from their tensors, and checks every shape.

Nothing is guessed or reshaped: a tensor that is missing, transposed, truncated or unknown is an error that names it.

Names follow timm (``blocks.0.attn.qkv.weight``); experts follow the public MoE Jetpack checkpoints
(``blocks.6.mlp.core_experts.vit_fc1.weight``, first axis = expert).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moe.errors import CheckpointError

# Axes of a tensor: c channels, a attention rows, q query, key and value rows, m hidden neurons.
BLOCK_AXES: Mapping[str, str] = {
    "norm1.weight": "c",
    "norm1.bias": "c",
    "attn.qkv.weight": "qc",
    "attn.qkv.bias": "q",
    "attn.q_proj.weight": "ac",
    "attn.q_proj.bias": "a",
    "attn.k_proj.weight": "ac",
    "attn.k_proj.bias": "a",
    "attn.v_proj.weight": "ac",
    "attn.v_proj.bias": "a",
    "attn.norm.weight": "a",
    "attn.norm.bias": "a",
    "attn.proj.weight": "ca",
    "attn.proj.bias": "c",
    "ls1.gamma": "c",
    "norm2.weight": "c",
    "norm2.bias": "c",
    "mlp.fc1.weight": "mc",
    "mlp.fc1.bias": "m",
    "mlp.fc1_g.weight": "mc",
    "mlp.fc1_g.bias": "m",
    "mlp.fc1_x.weight": "mc",
    "mlp.fc1_x.bias": "m",
    "mlp.norm.weight": "m",
    "mlp.norm.bias": "m",
    "mlp.fc2.weight": "cm",
    "mlp.fc2.bias": "c",
    "ls2.gamma": "c",
}
"""Name inside a block -> what its axes are."""

NEEDED = ("norm1.weight", "norm2.weight", "attn.proj.weight", "mlp.fc2.weight")
PROJECTIONS = (("attn.qkv.weight",), ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"))
FIRST_MAPS = (("mlp.fc1.weight",), ("mlp.fc1_g.weight", "mlp.fc1_x.weight"))
TOKENS = ("cls_token", "pos_embed", "reg_token", "dist_token", "mask_token")

EXPERT_PARTS: Mapping[str, str] = {
    "vit_fc1": "mlp.fc1",
    "vit_fc2": "mlp.fc2",
    "eva_fc1_g": "mlp.fc1_g",
    "eva_fc1_x": "mlp.fc1_x",
    "eva_norm": "mlp.norm",
    "eva_fc2": "mlp.fc2",
}
"""Part of an expert -> the dense tensor it is cut from (without ``.weight`` or ``.bias``)."""

FAMILIES = ("core_experts", "univ_experts", "experts", "glu_experts")
FIRST_PARTS = ("vit_fc1", "eva_fc1_g")

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_EXPERT = re.compile(rf"^blocks\.(\d+)\.mlp\.({'|'.join(FAMILIES)})\.({'|'.join(EXPERT_PARTS)})\.(weight|bias)$")


@dataclass(frozen=True)
class DenseLayout:
    """Sizes of a dense vision transformer: width, attention rows, hidden neurons, number of blocks."""

    dim: int
    attention: int
    hidden: int
    depth: int

    def size(self, axis: str) -> int:
        """Length of an axis of :data:`BLOCK_AXES`."""
        return {"c": self.dim, "a": self.attention, "q": 3 * self.attention, "m": self.hidden}[axis]


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one size in one block: ``blocks.{block}.mlp.{family}``."""

    block: int
    family: str
    count: int
    hidden: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class SuccessorLayout:
    """Sizes of a successor and its groups of experts, core before universal, blocks ascending."""

    dim: int
    depth: int
    groups: tuple[ExpertGroup, ...]

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Blocks with experts, ascending."""
        return tuple(sorted({group.block for group in self.groups}))

    def of_block(self, block: int) -> tuple[ExpertGroup, ...]:
        """Groups of a block in expert order."""
        return tuple(group for group in self.groups if group.block == block)


def block_name(name: str) -> tuple[int, str] | None:
    """``blocks.3.norm1.weight`` -> ``(3, "norm1.weight")``; None for names outside the blocks."""
    match = _BLOCK.match(name)
    return (int(match[1]), match[2]) if match else None


def expert_name(name: str) -> tuple[int, str, str, str] | None:
    """``blocks.6.mlp.core_experts.vit_fc1.bias`` -> ``(6, "core_experts", "vit_fc1", "bias")``, or None."""
    match = _EXPERT.match(name)
    return (int(match[1]), match[2], match[3], match[4]) if match else None


def is_head(name: str) -> bool:
    """Whether the tensor belongs to a classification head, which recycling leaves out."""
    return "head" in name


def stem_axis(name: str) -> int | None:
    """Which axis of a tensor outside the blocks counts channels (-1 last, 0 first); None for unknown names."""
    if name in TOKENS or name.startswith(("norm", "fc_norm")):
        return -1
    return 0 if name.startswith("patch_embed.proj.") else None


def read_dense(state: Mapping[str, Tensor], what: str) -> DenseLayout:
    """Sizes of a dense vision transformer, every tensor checked.

    Args:
        state: tensors by timm name.
        what: ``predecessor`` or the like, for messages.

    Raises:
        CheckpointError: another family, or missing, unknown, transposed or truncated tensors.
    """
    blocks = _by_block(state, what)
    depth = max(blocks) + 1
    absent = [block for block in range(depth) if block not in blocks]
    if absent:
        raise CheckpointError(f"The {what} has blocks up to {depth - 1}, but none of {absent}.", "Is it truncated?")
    first = blocks[0]
    _needs(first, 0, what)
    dim = _length(first["norm1.weight"], 0, "blocks.0.norm1.weight", what)
    attention = _length(first["attn.proj.weight"], 1, "blocks.0.attn.proj.weight", what)
    bias = first.get("mlp.fc1.bias", first.get("mlp.fc1_g.bias"))
    hidden = len(bias) if bias is not None and bias.ndim == 1 else _length(first["mlp.fc2.weight"], 1, "fc2", what)
    layout = DenseLayout(dim, attention, hidden, depth)
    for block, tensors in blocks.items():
        _needs(tensors, block, what)
        if tensors.keys() != first.keys():
            odd = sorted(tensors.keys() ^ first.keys())
            raise CheckpointError(f"Block {block} of the {what} differs from block 0 in {', '.join(odd[:4])}.")
        for name, tensor in tensors.items():
            expected = tuple(layout.size(axis) for axis in BLOCK_AXES[name])
            check_shape(tensor, expected, f"blocks.{block}.{name}", what)
    for name, tensor in state.items():
        axis = stem_axis(name)
        if block_name(name) is None and not is_head(name):
            if axis is None or tensor.ndim == 0:
                raise CheckpointError(f"The {what} has a tensor {name!r} {tuple(tensor.shape)} that is not a ViT's.")
            wanted = list(tensor.shape)
            wanted[axis] = dim
            check_shape(tensor, tuple(wanted), name, what)
    return layout


def read_successor(state: Mapping[str, Tensor]) -> SuccessorLayout:
    """Sizes of an MoE successor.

    Raises:
        CheckpointError: it has no experts, shared expert layers, or expert tensors that do not fit each other.
    """
    shared = [name for name in state if name.startswith("moe_layers_dict.")]
    if shared:
        raise CheckpointError(
            f"The successor shares expert layers between blocks ({shared[0]}, ...), which has no recycled form.",
            "Build it with an expert layer per block.",
        )
    found: dict[tuple[int, str], dict[str, str]] = {}
    for name in state:
        parts = expert_name(name)
        if parts is not None:
            found.setdefault(parts[:2], {})[f"{parts[2]}.{parts[3]}"] = name
    if not found:
        raise CheckpointError(
            f"The successor has no experts (blocks.N.mlp.{FAMILIES[0]}...); its first names are "
            f"{', '.join(list(state)[:4]) or 'none'}.",
            "Give the state dict of a Soft MoE or SpheroMoE vision transformer.",
        )
    depth = 1 + max(place[0] for place in map(block_name, state) if place is not None)
    dim = _successor_dim(state)
    ordered = sorted(found, key=lambda key: (key[0], FAMILIES.index(key[1])))
    groups = tuple(_group(state, block, family, found[block, family], dim) for block, family in ordered)
    return SuccessorLayout(dim, depth, groups)


def check_shape(tensor: Tensor, expected: tuple[int, ...], name: str, what: str) -> None:
    """Compare a shape.

    Raises:
        CheckpointError: it differs; says whether the tensor is transposed or truncated.
    """
    seen = tuple(tensor.shape)
    if seen == expected:
        return
    why = ""
    if len(seen) == 2 and seen == expected[::-1]:
        why = " It is transposed."
    elif len(seen) == len(expected) and all(a <= b for a, b in zip(seen, expected, strict=True)):
        why = " It is truncated."
    raise CheckpointError(f"{name} of the {what} has shape {seen} instead of {expected}.{why}")


def _by_block(state: Mapping[str, Tensor], what: str) -> dict[int, dict[str, Tensor]]:
    blocks: dict[int, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        place = block_name(name)
        if place is None:
            continue
        if place[1] not in BLOCK_AXES:
            unknown.append(name)
        blocks.setdefault(place[0], {})[place[1]] = tensor
    if not blocks:
        raise CheckpointError(
            f"The {what} has no tensors blocks.0...: it is not a vision transformer in timm's names. First names: "
            f"{', '.join(list(state)[:4]) or 'none'}.",
            "Convert its names first, or choose a ViT checkpoint.",
        )
    if unknown:
        raise CheckpointError(
            f"The {what} has {len(unknown)} tensors that a plain ViT block does not have: {', '.join(unknown[:4])}.",
            "Recycling knows attention, norms, layer scale and (gated) feed-forward layers.",
        )
    return blocks


def _needs(tensors: Mapping[str, Tensor], block: int, what: str) -> None:
    missing = [name for name in NEEDED if name not in tensors]
    for alternatives in (PROJECTIONS, FIRST_MAPS):
        if not any(all(name in tensors for name in names) for names in alternatives):
            missing.append(" or ".join(names[0] for names in alternatives))
    if missing:
        raise CheckpointError(f"Block {block} of the {what} lacks {', '.join(missing)}.", "Is the file truncated?")


def _length(tensor: Tensor, axis: int, name: str, what: str) -> int:
    if tensor.ndim <= axis:
        raise CheckpointError(f"{name} of the {what} has shape {tuple(tensor.shape)}: too few axes.")
    return tensor.shape[axis]


def _successor_dim(state: Mapping[str, Tensor]) -> int:
    name = "blocks.0.norm1.weight"
    if name not in state or state[name].ndim != 1:
        raise CheckpointError(f"The successor has no vector {name}: it is not a vision transformer in timm's names.")
    return len(state[name])


def _group(state: Mapping[str, Tensor], block: int, family: str, names: Mapping[str, str], dim: int) -> ExpertGroup:
    """One group of experts, its tensors checked against each other."""
    first = next((names[f"{part}.weight"] for part in FIRST_PARTS if f"{part}.weight" in names), None)
    if first is None or state[first].ndim != 3:
        raise CheckpointError(f"blocks.{block}.mlp.{family} of the successor has no first map of shape (E, H, D).")
    count, hidden = state[first].shape[:2]
    sizes = {"c": dim, "m": hidden}
    for part, name in names.items():
        module, kind = part.split(".")
        axes = BLOCK_AXES[f"{EXPERT_PARTS[module]}.{kind}"]
        check_shape(state[name], (count, *(sizes[axis] for axis in axes)), name, "successor")
    return ExpertGroup(block, family, count, hidden, tuple(names.values()))


def names_of(groups: Iterable[ExpertGroup]) -> list[str]:
    """All expert tensors of some groups."""
    return [name for group in groups for name in group.names]
