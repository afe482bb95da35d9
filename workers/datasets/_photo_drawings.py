"""Pictures of the generated stand-ins of photograph sets: a shape and colour for the class on a drawn ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.datasets import _miniatures as paint

_KINDS, _COLOURS = 8, len(paint.PALETTE)


def drawing(label: int, rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """RGB ``[height, width, 3]``: the shape tells ``label`` modulo 8, its colour and that of the ground the rest."""
    shape, rest = label % _KINDS, label // _KINDS
    hue = rest // _COLOURS
    ground = tuple(int(value) for value in np.clip(rng.integers(70, 150, 3) + 50 * (np.arange(3) == hue - 1), 0, 255))
    canvas = paint.Canvas(paint.backdrop(rng, (height, width), (ground[0], ground[1], ground[2]), 25))
    side = min(height, width)
    centre = (float(rng.uniform(0.4, 0.6)) * width, float(rng.uniform(0.4, 0.6)) * height)
    canvas.shape(shape, centre, float(rng.uniform(0.5, 0.7)) * side, paint.PALETTE[(rest + shape) % _COLOURS])
    return np.asarray(canvas.image, np.uint8)


def write_drawing(path: Path, label: int, rng: np.random.Generator) -> None:
    """A JPEG of 48 to 72 pixels a side; folders are made."""
    from PIL import Image

    height, width = (int(side) for side in rng.integers(48, 73, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawing(label, rng, height, width)).save(path, format="JPEG", quality=60)
