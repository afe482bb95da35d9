"""Image tokenizer: a ConvNeXt stem, up to three ConvNeXt stages, and learned positions concatenated to the tokens.

ConvNeXt: Liu et al., "A ConvNet for the 2020s", CVPR 2022, without final norm and head.

``Differs:`` a position grid of another size than the tokens' is resized (bicubic); the official branch for that can
never run, so there sizes must be equal.

Shapes: B batch, c channels, h rows, w columns, V = h*w tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.specs import GridSpec, TokenizerSpec

EPS = 1e-6
LAYER_SCALE = 1e-6


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``[B, c, h, w]``."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape-preserving."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """``x + gamma * W2 gelu(W1 LN(depthwise 7x7 x))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x_Bchw: Tensor) -> Tensor:
        """Shape-preserving."""
        h = self.norm(self.dwconv(x_Bchw).permute(0, 2, 3, 1))
        h = self.gamma * self.pwconv2(F.gelu(self.pwconv1(h)))
        y: Tensor = x_Bchw + h.permute(0, 3, 1, 2)
        return y


class ConvNeXtStages(nn.Module):
    """Stem and stages; convolutions and linear layers start truncated normal 0.02, biases 0."""

    def __init__(self, in_channels: int, dims: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            self.downsample_layers.append(
                nn.Sequential(nn.Conv2d(in_channels, dim, 4, stride=4), ChannelNorm(dim, eps=EPS))
                if stage == 0
                else nn.Sequential(ChannelNorm(dims[stage - 1], eps=EPS), nn.Conv2d(dims[stage - 1], dim, 2, stride=2))
            )
            self.stages.append(nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(depth))))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x_Bchw: Tensor) -> Tensor:
        """Images to the last stage's map."""
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x_Bchw = stage(down(x_Bchw))
        return x_Bchw


class PositionalGrid(nn.Module):
    """Learned positions ``grid`` [channels, rows, columns], concatenated after the features."""

    def __init__(self, spec: GridSpec) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.empty(spec.dim, *spec.grid_size))
        nn.init.trunc_normal_(self.grid, std=0.02)

    def forward(self, x_Bchw: Tensor) -> Tensor:
        """``[B, c + channels, h, w]``; the grid is resized when the map has another size."""
        grid = resized_grid(self.grid, (x_Bchw.shape[-2], x_Bchw.shape[-1]))
        return torch.cat([x_Bchw, grid.to(x_Bchw.dtype).expand(x_Bchw.shape[0], -1, -1, -1)], dim=1)


def resized_grid(grid_chw: Tensor, size: tuple[int, int]) -> Tensor:
    """A position grid at another number of rows and columns (bicubic), unchanged at the same."""
    if tuple(grid_chw.shape[-2:]) == size:
        return grid_chw
    return F.interpolate(grid_chw.unsqueeze(0), size=size, mode="bicubic", align_corners=False)[0]


class Tokenizer(nn.Module):
    """Images to tokens.

    Args:
        in_channels: channels of an image.
        width: width of the third stage; stages have a quarter, a half and all of it.
        spec: stages and positions.

    Raises:
        SpecError: the width is below 4, or not divisible by 4.
    """

    def __init__(self, in_channels: int, width: int, spec: TokenizerSpec) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise SpecError(f"The tokenizer halves its width twice, so it must be a multiple of 4, got {width}.")
        dims = (width // 4, width // 2, width)[: spec.num_stages]
        self.backbone = ConvNeXtStages(in_channels, dims, spec.blocks)
        grid = spec.positional_grid_kwargs
        self.positional_grid = None if grid is None else PositionalGrid(grid)
        self.in_channels = in_channels
        self.stride = 4 * 2 ** (spec.num_stages - 1)
        self.out_features = dims[-1] + (0 if grid is None else grid.dim)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, c, h, w] -> [B, V, N]``, tokens in row-major order; pixels beyond the last full stride are not seen.

        Raises:
            SpecError: images of another number of channels, or smaller than the total stride.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < self.stride:
            raise SpecError(
                f"The tokenizer reads images [B, {self.in_channels}, h, w] of at least {self.stride} pixels a side, "
                f"got {tuple(images.shape)}."
            )
        x_Bchw: Tensor = self.backbone(images)
        if self.positional_grid is not None:
            x_Bchw = self.positional_grid(x_Bchw)
        return x_Bchw.flatten(2).transpose(1, 2)


class TokenShape(NamedTuple):
    """Rows, columns of the tokens of an image."""

    rows: int
    columns: int


def token_shape(pixels: int, spec: TokenizerSpec) -> TokenShape:
    """Rows and columns of tokens of a square image."""
    side = pixels // 4
    for _ in range(spec.num_stages - 1):
        side //= 2
    return TokenShape(side, side)
