"""Pixel operations of the embedded sets: resizing, warping, padding, photo patches, glyph masks.

Everything works on float32 images in [0, 1]. Resizing and warping are plain element-wise NumPy, so results do not
depend on a BLAS or on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def resize_bilinear(images: NDArray[Any], size: int) -> FloatArray:
    """Enlarge ``[N, H, W]`` to ``[N, size, size]``, bilinear with half-pixel centres and clamped edges."""

    def axis(values: FloatArray, length: int, dim: int) -> FloatArray:
        position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, length - 1)
        shape = [1, 1, 1]
        shape[dim] = size
        weight = (position - low).astype(np.float32).reshape(shape)
        return np.take(values, low, dim) * (1 - weight) + np.take(values, high, dim) * weight

    data = images.astype(np.float32)
    return axis(axis(data, data.shape[1], 1), data.shape[2], 2)


def box_resize(image: FloatArray, factor: int) -> FloatArray:
    """Shrink ``[..., H, W]`` by averaging ``factor`` x ``factor`` blocks."""
    *lead, height, width = image.shape
    blocks = image.reshape(*lead, height // factor, factor, width // factor, factor)
    return np.asarray(blocks.mean(axis=(-3, -1)), dtype=np.float32)


def pad(images: FloatArray, margin: int) -> FloatArray:
    """Zero border of ``margin`` pixels around ``[N, H, W]``."""
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin)))


def affine(
    image: FloatArray,
    degrees: float = 0.0,
    shear: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> FloatArray:
    """Rotate counter-clockwise, shear in x, scale and shift ``[H, W]`` about its centre; bilinear, zeros outside.

    Args:
        image: one channel.
        degrees: rotation.
        shear: x += shear * y, applied before the rotation.
        scale: > 1 enlarges.
        shift: (x, y) in pixels, to the right and down.
    """
    height, width = image.shape
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    angle = np.deg2rad(degrees)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x - centre_x - shift[0], y - centre_y - shift[1]
    # Inverse map: undo the rotation (y points down, hence the signs), then the shear, then the scale.
    source_x, source_y = cos * x - sin * y, sin * x + cos * y
    source_x = source_x - shear * source_y
    return sample(image, source_x / scale + centre_x, source_y / scale + centre_y)


def sample(image: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    """Bilinear look-up of ``image`` ``[..., H, W]`` at pixel positions ``x``, ``y`` ``[h, w]``; zero outside."""
    height, width = image.shape[-2:]
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    weight_x, weight_y = (x - left).astype(np.float32), (y - top).astype(np.float32)
    result: FloatArray = np.zeros((*image.shape[:-2], *x.shape), np.float32)
    for d_y, w_y in ((0, 1 - weight_y), (1, weight_y)):
        for d_x, w_x in ((0, 1 - weight_x), (1, weight_x)):
            row, column = top + d_y, left + d_x
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixels = image[..., np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
            result += pixels * (w_x * w_y * inside).astype(np.float32)
    return result


def blur(image: FloatArray, sigma: float) -> FloatArray:
    """Gaussian blur of ``[H, W]``, standard deviation in pixels, cut at four of them, mirrored edges."""
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = image.shape
    padded = np.pad(image, radius, mode="symmetric")
    rows = np.stack([weight * padded[i : i + height] for i, weight in enumerate(weights)]).sum(axis=0)
    result: FloatArray = np.stack([weight * rows[:, i : i + width] for i, weight in enumerate(weights)]).sum(axis=0)
    return result


def rotate_batch(images: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """Rotate ``[N, H, W]`` counter-clockwise about the centre; bilinear, zeros outside, rounded to uint8."""
    height, width = images.shape[1:]
    angle = np.deg2rad(degrees)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    source = (cos * x - sin * y + (width - 1) / 2, sin * x + cos * y + (height - 1) / 2)
    blocks = [sample(block.astype(np.float32), *source) for block in np.array_split(images, len(images) // 512 + 1)]
    return np.rint(np.concatenate(blocks)).astype(np.uint8)


def to_uint8(images: FloatArray) -> NDArray[np.uint8]:
    """[0, 1] floats to 0..255, rounded half to even."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def photos() -> list[FloatArray]:
    """The two photographs that ship with scikit-learn (CC BY 2.0), float32 ``[427, 640, 3]`` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(image, np.float32) / np.float32(255) for image in load_sample_images().images]


def photo_patch(pictures: list[FloatArray], rng: np.random.Generator, size: int = 32, stride: int = 2) -> FloatArray:
    """A random window of a random photograph, every ``stride``-th pixel: float32 ``[size, size, 3]``."""
    picture = pictures[int(rng.integers(len(pictures)))]
    span = size * stride
    top = int(rng.integers(picture.shape[0] - span + 1))
    left = int(rng.integers(picture.shape[1] - span + 1))
    return picture[top : top + span : stride, left : left + span : stride]


@lru_cache(maxsize=4096)
def glyph_mask(font: Path, text: str, points: int = 64, canvas: int = 96) -> FloatArray:
    """``text`` drawn with a font file, its ink centred on a square canvas: float32 ``[canvas, canvas]`` in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(font), points, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(text)
    image = Image.new("L", (canvas, canvas), 0)
    origin = ((canvas - right + left) / 2 - left, (canvas - bottom + top) / 2 - top)
    ImageDraw.Draw(image).text((round(origin[0]), round(origin[1])), text, fill=255, font=face)
    mask: FloatArray = np.asarray(image, np.float32) / np.float32(255)
    mask.setflags(write=False)
    return mask
