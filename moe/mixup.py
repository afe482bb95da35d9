"""Mixup and CutMix of a whole batch with its mirror image, from injected draws.

A batch is mixed with itself in reverse order. Mixup (arXiv 1710.09412): ``lam * x + (1 - lam) * flip(x)``. CutMix
(arXiv 1905.04899): a box of the flipped batch is pasted in, lam is the share of the image that stays. Targets are
smoothed one-hot rows, mixed alike. Recipe: DeiT (arXiv 2012.12877), batch mode.

- Parity: a box reaches ``side // 2`` to each side of its centre, as timm did when these recipes were published. timm
  1.0.31 rounds odd sides differently, so that its Mixup class gives other boxes; its ``mixup_target`` is used as is.

Shapes: B batch, C channels, H, W image, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import mixup_target
from torch import Tensor

from moe.errors import DataError, SpecError


@dataclass(frozen=True)
class MixDraw:
    """The random numbers of one batch.

    Attributes:
        lam: draw of Beta(alpha, alpha), in [0, 1]; 1 mixes nothing.
        cutmix: paste a box instead of blending.
        centre: row and column of the box's centre; needed for CutMix.
    """

    lam: float
    cutmix: bool = False
    centre: tuple[int, int] | None = None


def draw_mix(
    generator: np.random.Generator,
    size: tuple[int, int],
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> MixDraw:
    """Random numbers for one batch.

    Args:
        generator: their only source.
        size: height and width of the images.
        mixup_alpha: of the Beta distribution; 0 turns mixup off.
        cutmix_alpha: the same for CutMix.
        prob: probability that a batch is mixed at all.
        switch_prob: probability of CutMix where both are on.

    Raises:
        SpecError: negative alphas, or probabilities outside [0, 1].
    """
    if min(mixup_alpha, cutmix_alpha) < 0 or not (0 <= prob <= 1 and 0 <= switch_prob <= 1):
        raise SpecError(
            f"mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}, prob={prob}, switch_prob={switch_prob}.",
            "Alphas are at least 0 and probabilities between 0 and 1.",
        )
    mixed, switched = generator.random(2)
    if max(mixup_alpha, cutmix_alpha) == 0 or mixed >= prob:
        return MixDraw(1.0)
    cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or bool(switched < switch_prob))
    alpha = cutmix_alpha if cutmix else mixup_alpha
    lam = float(generator.beta(alpha, alpha))
    centre = (int(generator.integers(size[0])), int(generator.integers(size[1])))
    return MixDraw(lam, cutmix, centre if cutmix else None)


def mix(
    images: Tensor, labels_B: Tensor, draw: MixDraw, num_classes: int, label_smoothing: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Mixed images and soft targets.

    Args:
        images: ``[B, C, H, W]``, not changed.
        labels_B: int64 classes.
        draw: the random numbers.
        num_classes: K.
        label_smoothing: s; one-hot rows become ``1 - s + s / K`` and ``s / K``.

    Returns:
        Images ``[B, C, H, W]`` and targets ``[B, K]``.

    Raises:
        DataError: labels outside of the classes, or not one per image.
        SpecError: a CutMix draw without centre, or lam outside [0, 1].
    """
    if labels_B.shape != images.shape[:1]:
        raise DataError(f"Labels have shape {tuple(labels_B.shape)} for images of shape {tuple(images.shape)}.")
    if labels_B.numel() and not 0 <= int(labels_B.min()) <= int(labels_B.max()) < num_classes:
        raise DataError(
            f"Labels run from {int(labels_B.min())} to {int(labels_B.max())}.", f"There are {num_classes} classes."
        )
    if not 0 <= draw.lam <= 1 or (draw.cutmix and draw.centre is None):
        raise SpecError(f"{draw} cannot be applied.", "lam lies between 0 and 1, and CutMix needs a centre.")
    lam, mixed = draw.lam, images
    if draw.cutmix:
        rows, columns = box(images.shape[-2], images.shape[-1], draw)
        mixed = images.clone()
        mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        lam = 1.0 - area / float(images.shape[-2] * images.shape[-1])
    elif lam < 1:
        mixed = images * lam + images.flip(0) * (1 - lam)
    target: Tensor = mixup_target(labels_B, num_classes, lam, label_smoothing)
    return mixed, target.to(torch.promote_types(images.dtype, torch.float32))


def box(height: int, width: int, draw: MixDraw) -> tuple[slice, slice]:
    """Rows and columns of a CutMix box, cut off at the borders."""
    cy, cx = draw.centre or (0, 0)
    ratio = np.sqrt(1.0 - draw.lam)
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    return (
        slice(max(cy - half_h, 0), min(cy + half_h, height)),
        slice(max(cx - half_w, 0), min(cx + half_w, width)),
    )
