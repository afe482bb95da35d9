"""svhn: photographed house numbers, cropped to one of 10 digits, 73,257 to train on and 26,032 to test on, RGB 32x32.

Layout as torchvision's ``SVHN``: ``svhn/{train,test}_32x32.mat``; the class 10 of the files is the digit 0.
Source: Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._arrays import domain_data
from workers.datasets._listed_images import FIELDS, HeldOutOptions, photo_info, read_mat, with_validation
from workers.datasets._photo_drawings import drawing
from workers.datasets._taken_in import take_in
from workers.datasets._wilds import MARKER
from workers.datasets.base import DomainData, IntArray, Missing

FOLDER, SIDE, CLASSES = "svhn", 32, 10
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
_SIZES = {"train": 73257, "test": 26032}

INFO = photo_info(
    "svhn",
    CLASSES,
    "SVHN: digits of photographed house numbers, RGB 32x32, one domain",
    side=SIDE,
    licence="non-commercial use only",
    source="official files train_32x32.mat and test_32x32.mat, in torchvision's layout",
    citation="Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning",
)


class Options(HeldOutOptions):
    """What a user may choose."""


def load(root: Path, options: Options) -> DomainData:
    """Training images, a part of them as ``val``, and test images, in the order of the files.

    Raises:
        NotFoundError: a file is not there.
        DataError: a file is damaged or holds something else.
    """
    gaps = missing(root)
    if gaps:
        raise NotFoundError(f"svhn: missing {', '.join(gap.what for gap in gaps)}.", gaps[0].fix)
    generated = (root / FOLDER / MARKER).is_file()
    parts = {split: _read(root / FOLDER / name, None if generated else _SIZES[split]) for split, name in FILES.items()}
    images = np.concatenate([pictures for pictures, _ in parts.values()])
    labels = np.concatenate([found for _, found in parts.values()])
    count = len(parts["train"][1])
    official = {"train": np.arange(count), "test": np.arange(count, len(labels))}
    names = {
        "domain": ("all",),
        "y": tuple(map(str, range(CLASSES))),
        **({"_miniature": ("yes",)} if generated else {}),
    }
    metadata = np.stack([np.zeros_like(labels), labels], axis=1)
    return domain_data(INFO, images, labels, metadata, FIELDS, with_validation(official, options), names)


def missing(root: Path) -> list[Missing]:
    """Files that are not there."""
    fix = (
        f"Put the two official files into {root / FOLDER} or run `moepipe data import svhn FOLDER`; `moepipe data "
        "miniature svhn` makes a small generated stand-in."
    )
    lost = [name for name in FILES.values() if not (root / FOLDER / name).is_file()]
    return [Missing(f"file {root / FOLDER / name}", fix) for name in lost]


def import_archive(root: Path, archive: Path) -> Path:
    """Link a folder that holds both files, or take an archive of them in. Raises as :func:`take_in`."""

    def is_set(folder: Path) -> bool:
        return all((folder / name).is_file() for name in FILES.values())

    return take_in(root / FOLDER, "svhn", archive, is_set, " and ".join(FILES.values()))


def miniature(root: Path, seed: int) -> None:
    """Write a small generated set in the official layout."""

    def generate(folder: Path, seed: int) -> None:
        from scipy.io import savemat

        for number, (name, count) in enumerate(zip(FILES.values(), (200, 80), strict=True)):
            rng = np.random.default_rng([seed, number, 3])
            labels = rng.permutation(np.arange(count) % CLASSES)
            pictures = np.stack([drawing(int(label), rng, SIDE, SIDE) for label in labels], axis=-1)
            classes = np.where(labels == 0, CLASSES, labels).astype(np.uint8)
            savemat(folder / name, {"X": pictures, "y": classes[:, None]})

    paint.write_set(root / FOLDER, "svhn", seed, generate)


def _read(path: Path, count: int | None) -> tuple[NDArray[np.uint8], IntArray]:
    """Images ``[N, 32, 32, 3]`` and digits ``[N]`` of a file with ``count`` images (None: any number)."""
    pictures, classes = (np.asarray(values) for values in read_mat(path, "X", "y"))
    good = pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[:3] == (SIDE, SIDE, 3)
    if not good or classes.shape != pictures.shape[3:] or (count is not None and len(classes) != count):
        wanted = "N" if count is None else count
        raise DataError(
            f"{path}: X has shape {pictures.shape} and y {classes.shape}, expected ({SIDE}, {SIDE}, 3, {wanted}) and "
            f"({wanted},).",
            "Get the official file of cropped digits (format 2) again.",
        )
    if not 1 <= classes.min() <= classes.max() <= CLASSES:
        raise DataError(f"{path}: classes reach from {classes.min()} to {classes.max()}, expected 1 to {CLASSES}.")
    return np.ascontiguousarray(pictures.transpose(3, 0, 1, 2)), classes.astype(np.int64) % CLASSES
