"""cub200: CUB-200-2011, photographs of 200 kinds of birds, of which few-shot tasks are taken.

Layout as the official archive unpacks: ``CUB_200_2011/{images.txt,image_class_labels.txt,train_test_split.txt,
classes.txt}`` and ``CUB_200_2011/images/<class>/*.jpg``. Source: Wah et al. 2011, Caltech-UCSD Birds-200-2011.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import DataError
from workers.datasets._listed_images import HeldOutOptions, ListedSet, Listing, lines_of, photo_info
from workers.datasets._photo_drawings import write_drawing

TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
CLASSES, DRAWN = 200, 12

INFO = photo_info(
    "cub200",
    CLASSES,
    "CUB-200-2011: photographs of 200 kinds of birds, one domain",
    licence="not stated; for research, images by their photographers",
    source="official archive CUB_200_2011.tgz",
    citation="Wah et al. 2011, The Caltech-UCSD Birds-200-2011 Dataset",
)


class Options(HeldOutOptions):
    """What a user may choose."""


def _read(folder: Path, options: Any) -> Listing:
    """The four tables; rows in the order of ``images.txt``."""
    tables = [dict(_pair(folder / name, line) for line in lines_of(folder / name)) for name in TABLES]
    images, classes, training, names = tables
    if not images.keys() == classes.keys() == training.keys():
        raise DataError(
            f"{folder}: the tables list {len(images):,} images, {len(classes):,} classes and {len(training):,} parts.",
            "Restore the tables from CUB_200_2011.tgz.",
        )
    order = sorted(names, key=int)
    place = {number: label for label, number in enumerate(order)}
    unknown = sorted(set(classes.values()) - place.keys())
    if unknown or set(training.values()) - {"0", "1"}:
        raise DataError(
            f"{folder}: classes {unknown[:3]} or parts that the tables do not define.", "Restore the tables."
        )
    labels = np.array([place[classes[number]] for number in images], np.int64)
    part = np.array([training[number] == "1" for number in images])
    splits = {"train": np.flatnonzero(part).astype(np.int64), "test": np.flatnonzero(~part).astype(np.int64)}
    paths = [f"images/{name}" for name in images.values()]
    return Listing(paths, labels, splits, tuple(names[number] for number in order))


def _pair(path: Path, line: str) -> tuple[str, str]:
    number, _, rest = line.partition(" ")
    if not number.isdecimal() or not rest:
        raise DataError(f"{path}: {line!r} is no number and a value.", "Restore the tables from CUB_200_2011.tgz.")
    return number, rest.strip()


def _draw(folder: Path, rng: np.random.Generator) -> None:
    lines: dict[str, list[str]] = {name: [] for name in TABLES}
    image = 0
    for label in range(DRAWN):
        name = f"{label + 1:03d}.Bird_{label + 1}"
        lines["classes.txt"].append(f"{label + 1} {name}")
        for shot in range(24):
            image += 1
            write_drawing(folder / f"images/{name}/bird_{shot:04d}.jpg", label, rng)
            lines["images.txt"].append(f"{image} {name}/bird_{shot:04d}.jpg")
            lines["image_class_labels.txt"].append(f"{image} {label + 1}")
            lines["train_test_split.txt"].append(f"{image} {int(shot < 8)}")
    for table, own in lines.items():
        (folder / table).write_text("\n".join(own) + "\n")


SET = ListedSet(
    INFO,
    "CUB_200_2011",
    "images",
    {"train": 5_994, "test": 5_794},
    lambda options: TABLES,
    _read,
    _draw,
    "Get CUB_200_2011.tgz of Caltech.",
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
