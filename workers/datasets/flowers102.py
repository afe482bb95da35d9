"""flowers102: photographs of 102 kinds of flowers, 1,020 to train on, 1,020 to validate, 6,149 to test; one domain.

Layout as torchvision's ``Flowers102``: ``flowers-102/{jpg/image_00001.jpg, ..., imagelabels.mat, setid.mat}``.
Source: Nilsback & Zisserman 2008, Automated Flower Classification over a Large Number of Classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import DataError
from workers.datasets._listed_images import ListedSet, Listing, PlainOptions, listed, photo_info, read_mat
from workers.datasets._photo_drawings import write_drawing
from workers.datasets.base import IntArray

LABELS, SPLITS = "imagelabels.mat", "setid.mat"
IDS = {"train": "trnid", "val": "valid", "test": "tstid"}
CLASSES = 102

INFO = photo_info(
    "flowers102",
    CLASSES,
    "Flowers-102: photographs of 102 kinds of flowers, few of each, one domain",
    licence="not stated; for research",
    source="official files 102flowers.tgz, imagelabels.mat and setid.mat, in torchvision's layout",
    citation="Nilsback and Zisserman 2008, Automated Flower Classification over a Large Number of Classes",
)


class Options(PlainOptions):
    """Nothing to choose: the validation images are official."""


def _tables(options: object) -> tuple[str, ...]:
    return LABELS, SPLITS


def _read(folder: Path, options: object) -> Listing:
    labels = _whole(folder / LABELS, "labels", read_mat(folder / LABELS, "labels")[0]) - 1
    parts: dict[str, list[tuple[str, int]]] = {}
    for split, ids in zip(IDS, read_mat(folder / SPLITS, *IDS.values()), strict=True):
        numbers = _whole(folder / SPLITS, IDS[split], ids)
        if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(labels):
            raise DataError(
                f"{folder / SPLITS}: {IDS[split]} reaches from {numbers.min()} to {numbers.max()}, and {LABELS} has "
                f"{len(labels)} images.",
                "Both files must be of the same release.",
            )
        parts[split] = [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1])) for number in numbers]
    return listed(parts)


def _whole(path: Path, name: str, values: Any) -> IntArray:
    found = np.atleast_1d(np.asarray(values))
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{path}: {name} is no list of whole numbers.", "Restore it from the official release.")
    return found.astype(np.int64)


def _draw(folder: Path, rng: np.random.Generator) -> None:
    from scipy.io import savemat

    counts = {"trnid": 2, "valid": 1, "tstid": 2}
    places = [(label, name) for label in range(CLASSES) for name, count in counts.items() for _ in range(count)]
    order = rng.permutation(len(places))
    for number, place in enumerate(order, start=1):
        write_drawing(folder / f"jpg/image_{number:05d}.jpg", places[place][0], rng)
    savemat(folder / LABELS, {"labels": np.array([[places[p][0] + 1 for p in order]], np.uint8)})
    ids = {name: [n for n, p in enumerate(order, start=1) if places[p][1] == name] for name in counts}
    savemat(folder / SPLITS, {name: np.array([numbers], np.uint16) for name, numbers in ids.items()})


SET = ListedSet(
    INFO,
    "flowers-102",
    "jpg",
    {"train": 1020, "val": 1020, "test": 6149},
    _tables,
    _read,
    _draw,
    "Unpack 102flowers.tgz (folder jpg) and put imagelabels.mat and setid.mat beside it.",
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
