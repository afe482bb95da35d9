"""Sparse upcycling: a vision transformer with mixtures of experts out of the weights of a dense one.

Every expert of a sparse block begins as an exact copy of that block's pretrained feed-forward network; gate noise,
dropout and routing break the symmetry. Gates are fresh, and so is the head unless the class counts agree. Since the
output is weighted by the gate's probability (top-1), the sparse network does not begin with the dense one's function.
Sources: Komatsuzaki et al. (arXiv 2212.05055); GMoE (arXiv 2206.04046, section 5), public code, commit 0689d557.

Known differences: everything but gates and heads must be there and fit (the public code raises for its own gates and
has another path, with wrong names, for npz weights). Weights in the npz layout of AugReg go through timm's own loader
of a dense network first; its state dict comes in here.

Shapes: D width, H hidden width, E experts, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moe.backbones import check_state
from moe.errors import CheckpointError
from moe.models.surgery import moe_layers

HEADS = ("head.", "head_dist.")
PATCHES = "patch_embed.proj.weight"
POSITIONS = "pos_embed"
_DENSE = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


class Upcycled(NamedTuple):
    """A state dict for the sparse network.

    Attributes:
        state: every tensor of the network by name; the fresh ones are its own.
        fresh: names of the tensors that keep their random initialisation: gates, and heads of other class counts.
    """

    state: dict[str, Tensor]
    fresh: list[str]


def upcycle(dense: Mapping[str, Tensor], vit: VisionTransformer) -> Upcycled:
    """Fit the weights of a dense vision transformer to ``vit``, a network with or without sparse blocks.

    Positions of another grid are interpolated (bicubic), input channels adapted: one channel gets the sum of the three,
    other numbers repeat them in turn, scaled by 3 / channels. Nothing else is reshaped.

    Args:
        dense: state dict under timm's names, e.g. of ``deit_small_patch16_224``.
        vit: the target (``moe.models.vit``); it is not changed.

    Raises:
        CheckpointError: tensors missing, unexpected or of another shape; positions that do not form a square.
    """
    own = vit.state_dict()
    sources = {name: _source(name, vit) for name in own}
    check_state(dense, _expected(dense, own, sources), "These weights are not a dense network of this geometry")
    state, fresh = {}, []
    for name, value in own.items():
        source = sources[name]
        if source is None or (name.startswith(HEADS) and not _same(dense.get(name), value)):
            state[name] = value
            fresh.append(name)
        elif name == POSITIONS:
            state[name] = resize_positions(dense[name], vit)
        elif name == PATCHES:
            state[name] = adapt_channels(dense[name], value.shape[1])
        elif source != name:
            state[name] = dense[source].expand(value.shape[0], *dense[source].shape).clone()
        else:
            state[name] = dense[name]
    return Upcycled(state, fresh)


def load_upcycled(vit: VisionTransformer, dense: Mapping[str, Tensor]) -> list[str]:
    """Load :func:`upcycle` into ``vit`` in place and return the names of the tensors that stayed fresh."""
    state, fresh = upcycle(dense, vit)
    vit.load_state_dict(state)
    return fresh


def resize_positions(positions_1ND: Tensor, vit: VisionTransformer) -> Tensor:
    """Position embeddings for the grid of ``vit``: class (and distillation) entries stay, the square grid is resized.

    Raises:
        CheckpointError: the remaining entries do not form a square.
    """
    prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
    grid = tuple(vit.patch_embed.grid_size)
    count = positions_1ND.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise CheckpointError(
            f"{POSITIONS} has {positions_1ND.shape[1]} entries; without the {prefix} of class and distillation token "
            "they do not form a square.",
            "Check that checkpoint and network agree in being distilled.",
        )
    if (side, side) == grid:
        return positions_1ND
    # Parity: the public code interpolates without antialiasing.
    resized: Tensor = resample_abs_pos_embed(
        positions_1ND, list(grid), [side, side], prefix, antialias=False, align_corners=False
    )
    return resized


def adapt_channels(kernel_DCPP: Tensor, channels: int) -> Tensor:
    """First convolution for another number of input channels.

    Raises:
        CheckpointError: the kernel is not of 3 channels, and of another number than asked for.
    """
    given = kernel_DCPP.shape[1]
    if given == channels:
        return kernel_DCPP
    if given != 3:
        raise CheckpointError(
            f"{PATCHES} is for {given} input channels, the network has {channels}.", "Only 3 channels can be adapted."
        )
    adapted: Tensor = adapt_input_conv(channels, kernel_DCPP)
    return adapted


def _source(name: str, vit: VisionTransformer) -> str | None:
    """Dense tensor that the tensor ``name`` of ``vit`` is made from; None for those of a gate."""
    for layer in moe_layers(vit):
        if name.startswith(f"{layer}."):
            _, _, tensor = name.rpartition(f"{layer}.experts.")
            return f"{layer}.{_DENSE[tensor]}" if tensor in _DENSE else None
    return name


def _expected(
    dense: Mapping[str, Tensor], own: Mapping[str, Tensor], sources: Mapping[str, str | None]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the dense state dict must have; heads may be missing and have any class count."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in own.items():
        source, shape = sources[name], tuple(value.shape)
        if source is None or (name.startswith(HEADS) and name not in dense):
            continue
        if source != name:
            shape = shape[1:]
        elif name.startswith(HEADS) and dense[name].ndim == value.ndim:
            shape = (dense[name].shape[0], *shape[1:])
        elif name in (PATCHES, POSITIONS) and name in dense and dense[name].ndim == value.ndim:
            # Channels and number of positions are adapted afterwards.
            shape = (shape[0], dense[name].shape[1], *shape[2:])
        shapes[source] = shape
    return shapes


def _same(given: Tensor | None, value: Tensor) -> bool:
    return given is not None and given.shape == value.shape
