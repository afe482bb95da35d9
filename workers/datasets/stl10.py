"""stl10: photographs of 10 classes, 5,000 to train on and 8,000 to test on, RGB 96x96; one domain.

Layout as torchvision's ``STL10``: ``stl10_binary/{train,test}_{X,y}.bin``; the unlabelled images are not read.
Source: Coates et al. 2011, An Analysis of Single-Layer Networks in Unsupervised Feature Learning.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._arrays import digest_arrays, sha256_file
from workers.datasets._listed_images import FIELDS, HeldOutOptions, check_labels, photo_info, with_validation
from workers.datasets._photo_drawings import drawing
from workers.datasets._taken_in import take_in
from workers.datasets._wilds import MARKER
from workers.datasets.base import DomainData, IntArray, Missing

FOLDER, SIDE, CLASSES = "stl10_binary", 96, 10
NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_SIZES = {"train": 5000, "test": 8000}
_FILES = tuple(f"{split}_{kind}.bin" for split in _SIZES for kind in "Xy")
_BYTES = 3 * SIDE * SIDE

INFO = photo_info(
    "stl10",
    CLASSES,
    "STL-10: photographs of 10 classes, few labels, RGB 96x96, one domain",
    side=SIDE,
    licence="not stated; images of ImageNet",
    source="official archive stl10_binary.tar.gz, in torchvision's layout",
    citation="Coates et al. 2011, An Analysis of Single-Layer Networks in Unsupervised Feature Learning",
)


class Options(HeldOutOptions):
    """What a user may choose."""


@dataclass(frozen=True)
class Pictures:
    """Images of several files, mapped and not read in: uint8 ``[96, 96, 3]``. The files store columns first."""

    parts: tuple[NDArray[np.uint8], ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        """Image ``row``."""
        for part in self.parts:
            if row < len(part):
                return np.ascontiguousarray(part[row].transpose(2, 1, 0))
            row -= len(part)
        raise IndexError(row)


def load(root: Path, options: Options) -> DomainData:
    """Training images, a part of them as ``val``, and test images, in the order of the files.

    Raises:
        NotFoundError: a file is not there.
        DataError: a file is damaged or holds something else.
    """
    folder = _require(root)
    generated = (folder / MARKER).is_file()
    parts = {split: _read(folder, split, None if generated else count) for split, count in _SIZES.items()}
    labels = np.concatenate([found for _, found in parts.values()])
    count = len(parts["train"][1])
    splits = with_validation({"train": np.arange(count), "test": np.arange(count, len(labels))}, options)
    value_names = {"domain": ("all",), "y": NAMES, **({"_miniature": ("yes",)} if generated else {})}
    metadata = np.stack([np.zeros_like(labels), labels], axis=1)
    arrays = {"metadata": metadata, **{f"split/{name}": rows for name, rows in splits.items()}}
    texts = {key: list(values) for key, values in value_names.items()}
    digest = digest_arrays(arrays, name="stl10", files=fingerprint(root, options), value_names=texts)
    images = Pictures(tuple(pictures for pictures, _ in parts.values()))
    return DomainData(INFO, images, labels, metadata, FIELDS, splits, digest, value_names)


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning. Raises NotFoundError."""
    folder = _require(root)
    files = [[name, sha256_file(folder / name)] for name in _FILES]
    return hashlib.sha256(json.dumps([files, (folder / MARKER).is_file()]).encode()).hexdigest()


def missing(root: Path) -> list[Missing]:
    """Files that are not there."""
    fix = (
        f"Unpack stl10_binary.tar.gz at {root} or run `moepipe data import stl10 ARCHIVE`; `moepipe data miniature "
        "stl10` makes a small generated stand-in."
    )
    return [Missing(f"file {root / FOLDER / n}", fix) for n in _FILES if not (root / FOLDER / n).is_file()]


def import_archive(root: Path, archive: Path) -> Path:
    """Take the archive in, or link an unpacked folder. Raises as :func:`take_in`."""

    def is_set(folder: Path) -> bool:
        return all((folder / name).is_file() for name in _FILES)

    return take_in(root / FOLDER, "stl10", archive, is_set, ", ".join(_FILES))


def miniature(root: Path, seed: int) -> None:
    """Write a small generated set in the official layout."""

    def generate(folder: Path, seed: int) -> None:
        for number, (split, count) in enumerate(zip(_SIZES, (100, 40), strict=True)):
            rng = np.random.default_rng([seed, number, 4])
            labels = rng.permutation(np.arange(count) % CLASSES)
            pictures = np.stack([drawing(int(label), rng, SIDE, SIDE).transpose(2, 1, 0) for label in labels])
            (folder / f"{split}_X.bin").write_bytes(pictures.tobytes())
            (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in NAMES))

    paint.write_set(root / FOLDER, "stl10", seed, generate)


def _require(root: Path) -> Path:
    gaps = missing(root)
    if gaps:
        raise NotFoundError(f"stl10: missing {', '.join(gap.what for gap in gaps)}.", gaps[0].fix)
    return root / FOLDER


def _read(folder: Path, split: str, count: int | None) -> tuple[NDArray[np.uint8], IntArray]:
    """Mapped images ``[N, 3, W, H]`` and classes ``[N]`` of a split with ``count`` images (None: any number)."""
    path = folder / f"{split}_X.bin"
    labels = np.fromfile(folder / f"{split}_y.bin", dtype=np.uint8).astype(np.int64) - 1
    size = path.stat().st_size
    if not len(labels) or size != len(labels) * _BYTES or (count is not None and len(labels) != count):
        wanted = f"{count:,} images" if count is not None else "equally many images"
        raise DataError(
            f"{path} has {size:,} bytes ({size / _BYTES:g} images) and {split}_y.bin {len(labels):,} classes, expected "
            f"{wanted} and classes.",
            "Restore them from stl10_binary.tar.gz.",
        )
    check_labels(folder / f"{split}_y.bin", labels, CLASSES)
    return np.memmap(path, np.uint8, "r", shape=(len(labels), 3, SIDE, SIDE)), labels
