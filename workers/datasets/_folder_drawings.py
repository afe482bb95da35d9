"""The pictures of the generated stand-ins of DomainBed's image sets: shapes for classes, a style for every domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workers.datasets import _miniatures as paint

_FEWEST, _IMAGES = 4, 280  # images of a class in a domain at least; of the whole set about


def draw_set(folder: Path, name: str, domains: Sequence[str], classes: Sequence[str], seed: int) -> None:
    """Write ``folder/<domain>/<class>/<number>.jpg``, JPEGs of 72 to 112 pixels a side.

    A class is a shape with a colour. A domain has a ground, light and tint of its own, and mixes up some of the
    colours: half of them in the last domain, so that colour alone does not carry over.

    Args:
        folder: empty.
        name: official name of the set; with ``seed`` it decides everything drawn.
        domains: folder names.
        classes: folder names, at most 14.
        seed: not negative.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    count = max(_FEWEST, _IMAGES // (len(domains) * len(classes)))
    for number, domain in enumerate(domains):
        ground = paint.random_colour(rng, 30, 225)
        tint, light = rng.uniform(0.7, 1.15, 3), float(rng.uniform(0.8, 1.1))
        confusion = 0.5 * number / max(1, len(domains) - 1)
        scenery = paint.backdrop(rng, (112, 112), ground, float(rng.uniform(8, 45)))
        for kind, label in enumerate(classes):
            place = folder / domain / label
            place.mkdir(parents=True)
            for shot in range(count):
                path = place / f"{label}_{shot:03d}.jpg"
                _picture(rng, scenery, kind, confusion).save(path, tint, light * float(rng.uniform(0.9, 1.1)))


def _picture(rng: np.random.Generator, scenery: paint.Floats, kind: int, confusion: float) -> paint.Canvas:
    height, width = (int(side) for side in rng.integers(72, 113, 2))
    picture = paint.Canvas(scenery[:height, :width])
    for _ in range(3):  # clutter of no meaning
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        picture.blob((x, y), (rng.uniform(2, 6), rng.uniform(2, 6)), paint.random_colour(rng, 60, 200))
    size = float(rng.uniform(0.45, 0.7)) * min(height, width)
    centre = (float(rng.uniform(size / 2, width - size / 2)), float(rng.uniform(size / 2, height - size / 2)))
    colour = int(rng.integers(len(paint.PALETTE))) if rng.uniform() < confusion else (kind + 3 * (kind // 8)) % 8
    picture.shape(kind, centre, size, paint.PALETTE[colour])
    return picture
