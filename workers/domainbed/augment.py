"""DomainBed's training augmentation on 8-bit images: random crop and scale, flip, colour jitter, grey.

Source: DomainBed's public code (commit b93c22a1): ``RandomResizedCrop(224, scale=(0.7, 1.0))``,
``RandomHorizontalFlip()``, ``ColorJitter(0.3, 0.3, 0.3, 0.3)``, ``RandomGrayscale()``. Pixels are those of
torchvision's operations on Pillow images, given the same draws. All draws of a batch are made at once, before any image
is touched, so results do not depend on the number of threads.

Known differences: draws come from the generator that is passed, not from torch's global one in a loader's worker
process. Images that are not RGB are only cropped and flipped.

Shapes: B images, H x W x C pixels, S x S after the crop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from moe.errors import SpecError

Pixels = NDArray[np.uint8]
SCALE = (0.7, 1.0)  # share of the image's area that a crop takes
RATIO = (3 / 4, 4 / 3)  # width by height of a crop
JITTER = 0.3  # of brightness, contrast, saturation and hue
GREY = 0.1  # chance
_TRIES = 10  # draws of a crop before the central one is taken


@dataclass(frozen=True)
class Draws:
    """What is drawn for B images.

    Attributes:
        boxes: int64 ``[B, 4]``: top, left, height, width of the crop.
        flips: bool ``[B]``.
        orders: int64 ``[B, 4]``: order of brightness (0), contrast (1), saturation (2), hue (3).
        factors: float64 ``[B, 4]``: three factors around 1 and the hue shift around 0, in turns of the colour circle.
        greys: bool ``[B]``.
    """

    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    orders: NDArray[np.int64]
    factors: NDArray[np.float64]
    greys: NDArray[np.bool_]


def draw(sizes: NDArray[np.int64], random: np.random.Generator) -> Draws:
    """Draw for images of ``sizes [B, 2]`` (height, width)."""
    count = len(sizes)
    boxes = _boxes(sizes, random)
    flips = random.random(count) < 0.5
    orders = np.argsort(random.random((count, 4)), axis=1)
    factors = random.uniform(1 - JITTER, 1 + JITTER, (count, 4))
    factors[:, 3] -= 1
    return Draws(boxes, flips, orders, factors, random.random(count) < GREY)


def augment(images: Sequence[Pixels], size: int, random: np.random.Generator, threads: int = 1) -> Pixels:
    """Augment a batch.

    Args:
        images: B images, uint8 ``[H, W, C]`` of any sizes.
        size: side S of the result in pixels.
        random: advanced by the same amount for every batch of B images.
        threads: images worked on at a time.

    Returns:
        uint8 ``[B, S, S, C]``.

    Raises:
        SpecError: images of another type.
    """
    if any(image.dtype != np.uint8 or image.ndim != 3 for image in images):
        raise SpecError(
            "DomainBed's augmentation works on 8-bit images [H, W, C] only.", "Set data_augmentation to false."
        )
    draws = draw(np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2), random)
    return np.stack(mapped(lambda row: _augmented(images[row], size, draws, row), range(len(images)), threads))


def resized(image: Pixels, size: int) -> Pixels:
    """``[H, W, C]`` at exactly ``size x size`` pixels: Pillow's antialiased bilinear filter, aspect not kept."""
    if image.shape[:2] == (size, size):
        return image
    if image.shape[2] == 3:
        return np.asarray(_picture(image).resize((size, size), Pillow.Resampling.BILINEAR))
    planes = [
        Pillow.fromarray(np.ascontiguousarray(image[:, :, plane])).resize((size, size), Pillow.Resampling.BILINEAR)
        for plane in range(image.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def mapped(function: Callable[[int], Pixels], rows: Sequence[int], threads: int) -> list[Pixels]:
    """``function`` of every row, in order; on up to ``threads`` threads (Pillow works outside Python's lock)."""
    if threads <= 1 or len(rows) <= 1:
        return [function(row) for row in rows]
    return list(_pool(threads, os.getpid()).map(function, rows))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="images")


def _augmented(image: Pixels, size: int, draws: Draws, row: int) -> Pixels:
    top, left, height, width = (int(value) for value in draws.boxes[row])
    pixels = resized(image[top : top + height, left : left + width], size)
    if draws.flips[row]:
        pixels = pixels[:, ::-1]
    return _coloured(pixels, draws, row) if pixels.shape[2] == 3 else pixels


def _coloured(pixels: Pixels, draws: Draws, row: int) -> Pixels:
    from torchvision.transforms import functional

    operations: tuple[Callable[[Any, float], Any], ...] = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    picture: Any = _picture(pixels)
    for kind in draws.orders[row]:
        picture = operations[kind](picture, float(draws.factors[row, kind]))
    if draws.greys[row]:
        picture = functional.rgb_to_grayscale(picture, num_output_channels=3)
    return np.asarray(picture)


def _picture(pixels: Pixels) -> Pillow.Image:
    return Pillow.fromarray(np.ascontiguousarray(pixels))


def _boxes(sizes: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Crops as torchvision draws them: the first of ten that fits, else the largest central one within ``RATIO``."""
    count = len(sizes)
    full_height, full_width = sizes[:, :1], sizes[:, 1:]
    area = full_height * full_width * random.uniform(*SCALE, (count, _TRIES))
    ratio = np.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (count, _TRIES)))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= full_width) & (heights > 0) & (heights <= full_height)
    first = np.argmax(fits, axis=1)[:, None]
    height = np.take_along_axis(heights, first, axis=1)
    width = np.take_along_axis(widths, first, axis=1)
    place = random.random((count, 2))
    top = np.floor(place[:, :1] * (full_height - height + 1))
    left = np.floor(place[:, 1:] * (full_width - width + 1))
    found = np.concatenate([top, left, height, width], axis=1).astype(np.int64)
    for row in np.flatnonzero(~fits.any(axis=1)):
        found[row] = _central(int(sizes[row, 0]), int(sizes[row, 1]))
    return found


def _central(height: int, width: int) -> tuple[int, int, int, int]:
    inner_height, inner_width = height, width
    if width / height < RATIO[0]:
        inner_height = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        inner_width = round(height * RATIO[1])
    return (height - inner_height) // 2, (width - inner_width) // 2, inner_height, inner_width
