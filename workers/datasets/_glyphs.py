"""Rendering of ``glyphs61``: one font family under its own fixed capture profile.

A glyph is drawn at 64 px on a 96x96 canvas (Hershey: strokes 3 to 8 px wide, fitted to 66%), turned, sheared, scaled
and shifted, averaged down to 32x32, blurred, and put on a background with texture, gradient and noise. The profile of
a family comes from a generator seeded with the CRC-32 of its name, so a family looks the same in every split.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.datasets import _render as render
from workers.datasets._arrays import Arrays
from workers.datasets._glyph_fonts import Family

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CANVAS = 96
SIDE = 32


@dataclass(frozen=True)
class Profile:
    """How a family's glyphs are captured; ranges are in :func:`profile`."""

    contrast: float
    background: float
    blur: float
    noise: float
    texture: float
    shear: float
    rotation: float
    gradient: tuple[float, float]
    scale: float
    photo: int


def profile(name: str) -> Profile:
    """The fixed capture profile of the family ``name``."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    contrast = float(rng.choice([-1, 1]) * rng.uniform(0.4, 1.0))
    return Profile(
        contrast=contrast,
        background=float(rng.uniform(max(0.0, -contrast), min(1.0, 1.0 - contrast))),
        blur=float(rng.choice([0.0, 0.0, 0.6, 1.2])),
        noise=float(rng.uniform(0, 0.08)),
        texture=float(rng.uniform(0, 0.35)),
        shear=float(rng.uniform(-0.25, 0.25)),
        rotation=float(rng.uniform(-12, 12)),
        gradient=(float(rng.uniform(-0.25, 0.25)), float(rng.uniform(-0.25, 0.25))),
        scale=float(rng.uniform(0.75, 1.1)),
        photo=int(rng.integers(2)),
    )


def render_family(
    family: Family, faces: list[Path], pictures: list[render.FloatArray], seed: int, count: int
) -> Arrays:
    """``count`` images of each of the 36 classes.

    Args:
        family: what to draw.
        faces: its font files; empty for Hershey.
        pictures: the photographs of :func:`workers.datasets._render.photos`.
        seed: with the family's name it decides every draw.
        count: images a class.

    Returns:
        ``images`` uint8 ``[36 * count, 32, 32, 1]``, ``labels``, ``face`` (index) and ``degrees`` (applied rotation,
        float32), one entry an image.
    """
    look = profile(family.name)
    rng = np.random.default_rng([seed, zlib.crc32(family.name.encode())])
    grey = np.asarray(pictures[look.photo].mean(axis=-1), np.float32)
    strokes = _hershey(family.faces[0]) if family.source == "hershey" else None
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    gradient = look.gradient[0] * ramp[None, :] + look.gradient[1] * ramp[:, None]
    images, chosen, degrees = [], [], []
    labels = np.repeat(np.arange(len(CLASSES)), count)
    for label in labels:
        face = int(rng.integers(max(len(faces), 1)))
        width = int(rng.integers(3, 9))
        mask = (
            render.glyph_mask(faces[face], CLASSES[label])
            if strokes is None
            else _stroke_mask(strokes, CLASSES[label], width)
        )
        turn = look.rotation + float(rng.uniform(-8, 8))
        warped = render.affine(
            mask,
            degrees=turn,
            shear=look.shear + float(rng.uniform(-0.1, 0.1)),
            scale=look.scale * float(rng.uniform(0.85, 1.1)),
            shift=(float(rng.uniform(-5, 5)), float(rng.uniform(-5, 5))),
        )
        images.append(_capture(render.box_resize(warped, CANVAS // SIDE), look, grey, gradient, rng))
        chosen.append(face)
        degrees.append(turn)
    return {
        "images": render.to_uint8(np.stack(images))[..., None],
        "labels": labels.astype(np.int64),
        "face": np.array(chosen, np.int64),
        "degrees": np.array(degrees, np.float32),
    }


def _capture(
    glyph: render.FloatArray,
    look: Profile,
    photo: render.FloatArray,
    gradient: render.FloatArray,
    rng: np.random.Generator,
) -> render.FloatArray:
    """Blur the glyph and put it on its background; float32 ``[32, 32]``, not clipped."""
    if look.blur:
        glyph = render.blur(glyph, look.blur)
    patch = render.photo_patch([photo], rng, SIDE)
    texture = look.texture * (patch - patch.mean())
    ink = look.contrast * float(rng.uniform(0.8, 1.2)) * glyph
    noise = rng.normal(0, look.noise, glyph.shape)
    return np.asarray(look.background + texture + gradient + ink + noise, np.float32)


def _hershey(name: str) -> Any:
    from HersheyFonts import HersheyFonts

    font = HersheyFonts()
    font.load_default_font(name)
    return font


def _stroke_mask(font: Any, text: str, width: int) -> render.FloatArray:
    """A stroke glyph fitted to 66% of the canvas, drawn at twice the size and averaged down."""
    from PIL import Image, ImageDraw

    lines = [np.array(list(stroke), float) for stroke in font.strokes_for_text(text)]
    points = np.concatenate(lines)
    low, high = points.min(axis=0), points.max(axis=0)
    side = 2 * CANVAS
    factor = 0.66 * side / max(float((high - low).max()), 1e-6)
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    for line in lines:
        placed = (line - (low + high) / 2) * factor + side / 2
        draw.line([(float(x), float(y)) for x, y in placed], fill=255, width=2 * width, joint="curve")
    return render.box_resize(np.asarray(image, np.float32) / np.float32(255), 2)
