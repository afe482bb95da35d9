"""RotatedMNIST and ColoredMNIST with the official random draws, bit by bit.

Both official parts are pooled, shuffled and dealt to the environments in turn. Source: DomainBed, commit b93c22a1;
Ghifary et al. 2015 (rotated), Arjovsky et al. 2019 (coloured).

:mod:`workers.datasets.rotated_mnist` and :mod:`workers.datasets.colored_mnist` are the project's own sets over the same
angles and colours: other draws, rounded instead of cut pixels, and splits of their own.

Known differences: images are rotated all at once, by the arithmetic of Pillow's bilinear filter for 8-bit images, and
stay uint8 (the official float image is ``x / 255``); the generator is passed.

Shapes: N images, n images of one environment, 28 x 28 pixels in the benchmark, H x W here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError
from workers.datasets._rotated import ANGLES6

if TYPE_CHECKING:
    from torch import Generator

Images = NDArray[np.uint8]
IntArray = NDArray[np.int64]
COLOUR_FLIPS = (0.1, 0.2, 0.9)  # +90%, +80%, -90%
LABEL_FLIP = 0.25
_BLOCK = 512  # images rotated at a time: keeps the float64 copies in the cache


@dataclass(frozen=True)
class Environment:
    """One domain.

    Attributes:
        x: uint8 ``[n, C, H, W]``.
        y: int64 ``[n]``.
        rows: int64 ``[n]``, row of each image in the pooled input.
    """

    x: Images
    y: IntArray
    rows: IntArray


@dataclass(frozen=True)
class Dealt:
    """All domains, and the shuffle they were dealt from (int64 ``[N]``)."""

    permutation: IntArray
    environments: tuple[Environment, ...]


def rotated_mnist(images: Images, labels: IntArray, generator: Generator, angles: Sequence[float] = ANGLES6) -> Dealt:
    """One environment per angle (degrees, counter-clockwise), one channel, labels are the digits.

    Args:
        images: uint8 ``[N, H, W]``, train part followed by test part.
        labels: digits ``[N]``.
        generator: the run's, just seeded; it is advanced.
        angles: in the order of the environments.

    Raises:
        DataError, SpecError: arrays that do not fit, or no angle.
    """
    permutation = _shuffle(images, labels, generator, len(angles))
    domains = []
    for number, angle in enumerate(angles):
        rows = permutation[number :: len(angles)]
        turned = rotate_bilinear(images[rows], angle)
        domains.append(Environment(turned[:, None], labels[rows].astype(np.int64), rows))
    return Dealt(permutation, tuple(domains))


def colored_mnist(
    images: Images,
    labels: IntArray,
    generator: Generator,
    flips: Sequence[float] = COLOUR_FLIPS,
    label_flip: float = LABEL_FLIP,
) -> Dealt:
    """One environment per chance ``flips`` that the colour contradicts the label; two channels, one of them black.

    The label is 1 for digits below 5, flipped with the chance ``label_flip``. Colour 1 lights channel 1.

    Args:
        images: uint8 ``[N, H, W]``, train part followed by test part.
        labels: digits ``[N]``.
        generator: the run's, just seeded; it is advanced.
        flips: in [0, 1], in the order of the environments.
        label_flip: in [0, 1].

    Raises:
        DataError, SpecError: arrays that do not fit, no environment, or a chance outside [0, 1].
    """
    if not all(0 <= chance <= 1 for chance in (*flips, label_flip)):
        raise SpecError(f"Chances {[*flips, label_flip]} must be from 0 to 1.")
    permutation = _shuffle(images, labels, generator, len(flips))
    domains = []
    for number, flip in enumerate(flips):
        rows = permutation[number :: len(flips)]
        y = (labels[rows] < 5) ^ _coin(len(rows), label_flip, generator)
        colour = (y ^ _coin(len(rows), flip, generator)).astype(np.int64)
        lit = colour[:, None] == np.arange(2)
        x = images[rows][:, None] * lit[:, :, None, None].astype(np.uint8)
        domains.append(Environment(x, y.astype(np.int64), rows))
    return Dealt(permutation, tuple(domains))


def rotate_bilinear(images: Images, degrees: float) -> Images:
    """Rotate ``[N, H, W]`` counter-clockwise about the centre, as Pillow's ``rotate`` with its bilinear filter.

    Black outside, values cut (not rounded) to integers. Quarter turns move pixels unchanged where the shape allows it.
    """
    degrees = degrees % 360
    height, width = images.shape[1:]
    quarter: dict[float, int] = {0: 0, 180: 2}
    quarter |= {90: 1, 270: 3} if height == width else {}
    if degrees in quarter:
        return np.ascontiguousarray(np.rot90(images, quarter[degrees], axes=(1, 2)))
    radians = -math.radians(degrees)
    a, b = round(math.cos(radians), 15), round(math.sin(radians), 15)
    c, d = round(-math.sin(radians), 15), round(math.cos(radians), 15)
    centre_x, centre_y = width / 2, height / 2
    offset_x = a * -centre_x + b * -centre_y + centre_x
    offset_y = c * -centre_x + d * -centre_y + centre_y
    row, column = np.mgrid[0:height, 0:width] + 0.5
    x, y = a * column + b * row + offset_x, c * column + d * row + offset_y
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    at_left, at_right = np.clip(left, 0, width - 1), np.clip(left + 1, 0, width - 1)
    at_top, at_bottom = np.clip(top, 0, height - 1), np.clip(top + 1, 0, height - 1)

    def turn(block: Images) -> Images:
        upper = _between(block[:, at_top, at_left], block[:, at_top, at_right], x - left)
        lower = _between(block[:, at_bottom, at_left], block[:, at_bottom, at_right], x - left)
        return np.asarray(np.where(inside, upper + (lower - upper) * (y - top), 0)).astype(np.uint8)

    result = np.zeros_like(images)
    for start in range(0, len(images), _BLOCK):
        result[start : start + _BLOCK] = turn(images[start : start + _BLOCK])
    return result


def _between(first: Images, second: Images, share: NDArray[np.float64]) -> NDArray[np.float64]:
    start = first.astype(np.float64)
    return np.asarray(start + (second - start) * share)


def _shuffle(images: Images, labels: IntArray, generator: Generator, environments: int) -> IntArray:
    import torch

    if images.dtype != np.uint8 or images.ndim != 3:
        raise DataError(f"Images of type {images.dtype} and shape {images.shape} are not uint8 [N, H, W].")
    if labels.shape != (len(images),):
        raise DataError(f"Labels of shape {labels.shape} do not fit {len(images)} images.")
    if environments == 0:
        raise SpecError("There is no environment to deal the images to.")
    permutation: Any = torch.randperm(len(images), generator=generator).numpy()
    return np.asarray(permutation, dtype=np.int64)


def _coin(count: int, chance: float, generator: Generator) -> NDArray[np.bool_]:
    """True with ``chance``, one float32 draw each."""
    import torch

    return np.asarray((torch.rand(count, generator=generator) < chance).numpy(), dtype=np.bool_)
