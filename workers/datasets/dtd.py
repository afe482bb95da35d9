"""dtd: photographs of 47 textures, 1,880 each to train, validate and test, in ten official partitions; one domain.

Layout as torchvision's ``DTD``: ``dtd/dtd/{images/<class>/*.jpg, labels/{train,val,test}<partition>.txt}``.
Source: Cimpoi et al. 2014, Describing Textures in the Wild.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from moe.errors import DataError
from workers.datasets._listed_images import ListedSet, Listing, PlainOptions, lines_of, listed, photo_info
from workers.datasets._photo_drawings import write_drawing

SPLITS = ("train", "val", "test")
PARTITIONS = 10
CLASSES = 47

INFO = photo_info(
    "dtd",
    CLASSES,
    "DTD: photographs of 47 textures, ten official partitions, one domain",
    licence="not stated; for research",
    source="official archive dtd-r1.0.1.tar.gz, in torchvision's layout",
    citation="Cimpoi et al. 2014, Describing Textures in the Wild",
)


class Options(PlainOptions):
    """What a user may choose."""

    partition: int = Field(1, ge=1, le=PARTITIONS, description="official partition; 1 is the usual one")


def _tables(options: Options | None) -> tuple[str, ...]:
    partition = 1 if options is None else options.partition
    return tuple(f"labels/{split}{partition}.txt" for split in SPLITS)


def _read(folder: Path, options: Options) -> Listing:
    names = {}
    for split, table in zip(SPLITS, _tables(options), strict=True):
        if not (folder / table).is_file():
            raise DataError(f"{folder / table} is not there.", "Restore it from dtd-r1.0.1.tar.gz.")
        names[split] = lines_of(folder / table)
        odd = next((name for name in names[split] if name.count("/") != 1 or ".." in name), None)
        if odd is not None:
            raise DataError(f"{folder / table}: {odd[:60]!r} is not `class/image.jpg`.", "Restore it from the archive.")
    classes = sorted({name.partition("/")[0] for own in names.values() for name in own})
    if len(classes) != CLASSES:
        raise DataError(
            f"{folder}/labels: partition {options.partition} has {len(classes)} classes, not {CLASSES}.",
            "Restore the tables from dtd-r1.0.1.tar.gz.",
        )
    number = {name: label for label, name in enumerate(classes)}
    parts = {split: [(f"images/{n}", number[n.partition("/")[0]]) for n in own] for split, own in names.items()}
    return listed(parts, tuple(classes))


def _draw(folder: Path, rng: np.random.Generator) -> None:
    (folder / "labels").mkdir()
    names = []
    for label in range(CLASSES):
        for shot in range(6):
            name = f"texture{label:02d}/texture{label:02d}_{shot:04d}.jpg"
            write_drawing(folder / "images" / name, label, rng)
            names.append(name)
    for partition in range(1, PARTITIONS + 1):
        turn = (np.arange(len(names)) + partition) % len(SPLITS)
        for number, split in enumerate(SPLITS):
            lines = [f"{name}\n" for name, own in zip(names, turn, strict=True) if own == number]
            (folder / f"labels/{split}{partition}.txt").write_text("".join(lines))


SET = ListedSet(
    INFO,
    "dtd/dtd",
    "images",
    dict.fromkeys(SPLITS, 1880),
    _tables,
    _read,
    _draw,
    "Unpack dtd-r1.0.1.tar.gz.",
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
