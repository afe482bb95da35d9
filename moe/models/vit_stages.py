"""A vision transformer that runs in pieces: any range of blocks, with embedding and head where they belong.

Teacher, meta model and every module cut from them are one class, :class:`ViTStages`; which piece it is stands in its
spec. Blocks and patch embedding are timm's, so that state-dict names are the usual ones: ``patch_embed.proj``,
``cls_token``, ``pos_embed``, ``blocks.<i>.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}``, ``norm``, ``head``. A
piece numbers its blocks from 0.

Sources: ViT (arXiv 2010.11929), Deep Incubation (2212.04129), m2mKD (2402.16918) and their public code.

Known differences: weights of the patch embedding keep PyTorch's initialisation (so does the reference); everything
else is drawn as there (truncated normal of 0.02, zero biases).

Shapes: B batch, T tokens (1 + patches), D width, K classes.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moe.errors import CheckpointError, SpecError
from moe.models.vit_specs import ViTSpec

WEIGHT_STD = 0.02


class ViTStages(nn.Module):
    """The blocks of a ViT or of one part of it.

    Args:
        spec: shape; ``spec.part`` says whether there is an embedding and a head.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.embeds:
            self.cls_token = nn.Parameter(torch.empty(1, 1, spec.dim))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + spec.grid**2, spec.dim))
            self.patch_embed = PatchEmbed(spec.image_size, spec.patch_size, spec.channels, spec.dim)
        rates = torch.linspace(0, spec.drop_path, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList([self._block(index, rate) for index, rate in enumerate(rates)])
        if spec.classifies:
            self.norm = nn.LayerNorm(spec.dim, eps=spec.ln_eps)
            self.head = nn.Linear(spec.dim, spec.num_classes)
        self.apply(_init)
        if spec.embeds:
            nn.init.trunc_normal_(self.cls_token, std=WEIGHT_STD)
            nn.init.trunc_normal_(self.pos_embed, std=WEIGHT_STD)

    def _block(self, index: int, drop_path: float) -> nn.Module:
        """The block of number ``index``; subclasses make others."""
        block: nn.Module = Block(**block_arguments(self.spec, drop_path))
        return block

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.spec.depth

    @property
    def in_dim(self) -> int:
        """Width of the tokens that enter the first block."""
        return self.spec.dim

    def forward(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """Run blocks ``[start, end)``.

        Args:
            x: images ``[B, C, H, W]`` if ``start`` is 0 and this part embeds, otherwise tokens ``[B, T, D]``.
            start: first block.
            end: end of the range; all blocks when left out.

        Returns:
            Logits ``[B, K]`` if the range reaches the end of a part with a head, otherwise tokens ``[B, T, D]``.

        Raises:
            SpecError: an empty or impossible range, or an input of another shape.
        """
        stop = self.depth if end is None else end
        if not 0 <= start < stop <= self.depth:
            raise SpecError(
                f"Blocks [{start}, {stop}) do not exist in a network of {self.depth} blocks.",
                "Ranges go forward and hold at least one block.",
            )
        if start == 0:
            x = self.embed(x) if self.spec.embeds else self._checked(x, self.in_dim)
        else:
            self._checked(x, None)
        for block in self.blocks[start:stop]:
            x = block(x)
        return self.classify(x) if stop == self.depth and self.spec.classifies else x

    def embed(self, images: Tensor) -> Tensor:
        """Tokens ``[B, 1 + patches, D]`` of images ``[B, C, H, W]``: class token first, positions added."""
        side, channels = self.spec.image_size, self.spec.channels
        if images.ndim != 4 or tuple(images.shape[1:]) != (channels, side, side):
            raise SpecError(
                f"Images have shape {tuple(images.shape)}, this network takes [B, {channels}, {side}, {side}].",
                "Resize the images, or build the network for their size (resize_positions adapts pos_embed).",
            )
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(images.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1) + self.pos_embed

    def classify(self, tokens_BTD: Tensor) -> Tensor:
        """Logits ``[B, K]`` from the normalised first token."""
        logits: Tensor = self.head(self.norm(tokens_BTD)[:, 0])
        return logits

    def _checked(self, tokens: Tensor, width: int | None) -> Tensor:
        if tokens.ndim != 3 or (width is not None and tokens.shape[-1] != width):
            raise SpecError(
                f"Tokens have shape {tuple(tokens.shape)}, this network takes [B, T, {width or self.spec.dim}].",
                "Give the output of the part before it, or add a stitch between different widths.",
            )
        return tokens


def block_arguments(spec: ViTSpec, drop_path: float) -> dict[str, object]:
    """Arguments of timm's ``Block`` for one block of ``spec``."""
    return {
        "dim": spec.dim,
        "num_heads": spec.heads,
        "mlp_ratio": spec.mlp_ratio,
        "qkv_bias": spec.qkv_bias,
        "drop_path": drop_path,
        "norm_layer": partial(nn.LayerNorm, eps=spec.ln_eps),
    }


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Position embeddings for another square grid: the first token stays, the others are interpolated bicubically.

    Args:
        pos_embed: ``[1, 1 + old * old, D]``.
        grid: new patches along one side.

    Returns:
        ``[1, 1 + grid * grid, D]``, in the input's dtype.

    Raises:
        CheckpointError: the old grid is not square, or the new one is empty.
    """
    patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    old = round(max(patches, 0) ** 0.5)
    if patches < 1 or old * old != patches or grid < 1:
        raise CheckpointError(
            f"Positions of shape {tuple(pos_embed.shape)} cannot be resized to a grid of {grid} x {grid}.",
            "Expected [1, 1 + n * n, D]: one class token and a square grid.",
        )
    # antialias off: the reference interpolates plainly also when the grid shrinks.
    resized: Tensor = resample_abs_pos_embed(pos_embed, [grid, grid], num_prefix_tokens=1, antialias=False)
    return resized


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
