"""Names of MoE Jetpack's public checkpoints, in both directions, and fitting weights to another image or patch size.

Layers of slots carry the released names themselves (``blocks.6.mlp.core_experts.vit_fc1.weight``, ...), so importing
and exporting is a strict check of names and shapes, plus what surrounds them: a training checkpoint of the host
framework nests the tensors under ``state_dict`` behind the prefix ``backbone.`` or ``model.``, the released start
weights are flat.

Reading a file (never by unpickling freely) is the caller's; state dicts come in and go out here.
Source: public code of MoE Jetpack at its last commit; FlexiViT (arXiv 2212.08013) for patches, through timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from moe.backbones import check_state
from moe.errors import CheckpointError
from moe.jetpack_specs import JetViTSpec
from moe.models.sphero_vit import build_sphero_vit

PREFIXES = ("backbone.", "model.", "module.")
_NESTS = ("state_dict", "model")

Shapes = dict[str, tuple[int, ...]]


def official_shapes(spec: JetViTSpec, num_classes: int) -> Shapes:
    """Names and shapes of a network's checkpoint, in the released order, without allocating it."""
    with torch.device("meta"):
        model = build_sphero_vit(spec, num_classes)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def flat_state(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, taken out of the nesting and without a common prefix.

    Raises:
        CheckpointError: something in it is not a tensor, or there are no tensors.
    """
    for name in _NESTS:
        inner = stored.get(name)
        if isinstance(inner, Mapping):
            stored = inner
    odd = [f"{name} ({type(value).__name__})" for name, value in stored.items() if not isinstance(value, Tensor)]
    if odd or not stored:
        raise CheckpointError(
            f"This is not a state dict: {', '.join(odd[:4]) or 'it is empty'}.", "Check which file was given."
        )
    state = dict(stored)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def from_official(stored: Mapping[str, Any], spec: JetViTSpec, num_classes: int) -> dict[str, Tensor]:
    """A checkpoint for ``build_sphero_vit(spec, num_classes)``: flat or nested, sizes fitted, checked.

    Args:
        stored: what the file holds.
        spec: the network; patches and positions of another size are resampled to its own.
        num_classes: K.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors, by name.
    """
    state = flat_state(stored)
    shapes = official_shapes(spec, num_classes)
    side = spec.image_size // spec.patch_size
    prefix = 0 if spec.no_embed_class else int(spec.class_token) + spec.reg_tokens
    state = fit_to_model(state, spec.patch_size, (side, side), prefix)
    check_state(state, shapes, "This is not a checkpoint of this network")
    return {name: state[name] for name in shapes}


def to_official(model: nn.Module, spec: JetViTSpec, form: Literal["flat", "nested"] = "flat") -> dict[str, Any]:
    """The tensors of a network under the released names and in their order.

    Args:
        model: a network of :func:`build_sphero_vit`.
        spec: what it was built from.
        form: ``flat`` like the released start weights, ``nested`` like a training checkpoint.

    Raises:
        CheckpointError: the network is not of this spec.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    head = state.get("head.weight")
    shapes = official_shapes(spec, 1 if head is None else head.shape[0])
    check_state(state, shapes, "This network is not of the given spec")
    flat = {name: state[name] for name in shapes}
    if form == "flat":
        return flat
    return {"state_dict": {f"backbone.{name}": value for name, value in flat.items()}}


def fit_to_model(
    state: Mapping[str, Tensor],
    patch_size: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> dict[str, Tensor]:
    """Resample patch embedding and positions to a network's sizes; all other tensors stay as they are.

    Args:
        state: tensors by timm's names.
        patch_size: side of the network's patches; another kernel is resampled as FlexiViT does.
        grid: rows and columns of patches of the network.
        num_prefix_tokens: class and register tokens that have a position.
        interpolation: of the resampling.
        antialias: of the resampling.

    Raises:
        CheckpointError: a patch kernel without four dimensions, or positions that are no square grid.
    """
    out = dict(state)
    kernel = out.get("patch_embed.proj.weight")
    if kernel is not None:
        if kernel.ndim != 4:
            raise CheckpointError(
                f"patch_embed.proj.weight has shape {tuple(kernel.shape)}.", "Expected [D, channels, side, side]."
            )
        if tuple(kernel.shape[2:]) != (patch_size, patch_size):
            out["patch_embed.proj.weight"] = resample_patch_embed(
                kernel, [patch_size, patch_size], interpolation=interpolation, antialias=antialias
            )
    positions = out.get("pos_embed")
    if positions is not None and positions.shape[1] != grid[0] * grid[1] + num_prefix_tokens:
        side = round(max(0, positions.shape[1] - num_prefix_tokens) ** 0.5)
        if positions.ndim != 3 or side < 1 or side * side + num_prefix_tokens != positions.shape[1]:
            raise CheckpointError(
                f"pos_embed {tuple(positions.shape)} is not {num_prefix_tokens} prefix tokens and a square grid.",
                "Check the number of class and register tokens.",
            )
        out["pos_embed"] = resample_abs_pos_embed(
            positions,
            list(grid),
            num_prefix_tokens=num_prefix_tokens,
            interpolation=interpolation,
            antialias=antialias,
        )
    return out
