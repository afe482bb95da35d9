"""Mixup and CutMix of a batch with a random permutation of itself, from injected draws.

MoE Jetpack's recipe mixes every batch, by mixup (arXiv 1710.09412, alpha 0.8) or CutMix (1905.04899, alpha 1) with
equal chance. Parity: order and generators of the draws are those of its host framework, so that a seed gives the same
batches. ``moe.mixup`` is the other common form, in which a batch is mixed with its mirror image.

Shapes: B batch, C channels, H, W image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe.errors import DataError, SpecError, nearest

Kind = Literal["mixup", "cutmix"]


@dataclass(frozen=True)
class PermutedMix:
    """The random numbers of one batch.

    Attributes:
        lam: draw of Beta(alpha, alpha): share of the image that stays (before CutMix corrects it).
        perm_B: int64, the image that each one is mixed with.
        box: CutMix's rows and columns ``(y1, y2, x1, x2)``, ends exclusive; None for mixup.
    """

    lam: float
    perm_B: Tensor
    box: tuple[int, int, int, int] | None = None


def draw_mix(
    kind: Kind, alpha: float, shape: Sequence[int], numbers: np.random.RandomState, generator: torch.Generator
) -> PermutedMix:
    """Draw lam, the permutation and, for CutMix, the centre of the box (row, then column), in this order.

    Args:
        kind: ``mixup`` or ``cutmix``.
        alpha: > 0.
        shape: ``(B, C, H, W)``.
        numbers: source of lam and of the centre.
        generator: source of the permutation.

    Raises:
        SpecError: another kind, or an alpha that is not positive.
    """
    if kind not in ("mixup", "cutmix"):
        raise SpecError(f"There is no way of mixing named {kind!r}.", nearest(kind, ("mixup", "cutmix")))
    if not alpha > 0:
        raise SpecError(f"alpha={alpha} of {kind} is not positive.")
    lam = float(numbers.beta(alpha, alpha))
    perm_B = torch.randperm(shape[0], generator=generator)
    if kind == "mixup":
        return PermutedMix(lam, perm_B)
    height, width = shape[-2:]
    ratio = float(np.sqrt(1.0 - lam))
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    cy, cx = int(numbers.randint(height)), int(numbers.randint(width))
    rows = (max(cy - half_h, 0), min(cy + half_h, height))
    columns = (max(cx - half_w, 0), min(cx + half_w, width))
    return PermutedMix(lam, perm_B, (*rows, *columns))


def choose_kind(numbers: np.random.RandomState) -> Kind:
    """Mixup or CutMix with equal chance, as the recipe does for every batch."""
    return "mixup" if numbers.choice(2) == 0 else "cutmix"


def apply_mix(images: Tensor, scores_BK: Tensor, draw: PermutedMix) -> tuple[Tensor, Tensor]:
    """Mixed images and scores; the inputs are not changed.

    Args:
        images: ``[B, C, H, W]``.
        scores_BK: one-hot or soft targets.
        draw: the random numbers.

    Raises:
        DataError: scores or permutation do not fit the number of images.
    """
    if scores_BK.ndim != 2 or len(scores_BK) != len(images) or len(draw.perm_B) != len(images):
        raise DataError(
            f"Images {tuple(images.shape)}, scores {tuple(scores_BK.shape)} and a permutation of {len(draw.perm_B)}.",
            "Scores are [B, K]: one row per image.",
        )
    lam, other = draw.lam, images[draw.perm_B]
    if draw.box is None:
        mixed = lam * images + (1 - lam) * other
    else:
        y1, y2, x1, x2 = draw.box
        mixed = images.clone()
        mixed[..., y1:y2, x1:x2] = other[..., y1:y2, x1:x2]
        lam = 1.0 - (y2 - y1) * (x2 - x1) / (images.shape[-2] * images.shape[-1])
    return mixed, lam * scores_BK + (1 - lam) * scores_BK[draw.perm_B]
