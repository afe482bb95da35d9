"""Sets as folders of classes, ``<part>/<class>/<image>``: rows in the order of torchvision's ``ImageFolder``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe.errors import DataError
from workers.datasets._arrays import digest_arrays
from workers.datasets._listed_images import FIELDS
from workers.datasets._photo_drawings import write_drawing
from workers.datasets._wilds import MARKER, ImageFiles
from workers.datasets.base import DatasetInfo, DomainData, IntArray

WNIDS = (
    "n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331",
    "n01498041", "n01514668", "n01514859", "n01518878", "n01530575", "n01531178",
)  # fmt: skip
"""Class folders of the generated stand-ins."""

Rows = Sequence[tuple[str, int]]


def class_rows(part: str, listing: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Rows:
    """(path below the set's folder, class) of every image of a part.

    Raises:
        DataError: a class folder that does not belong there, or without images.
    """
    number = {name: label for label, name in enumerate(classes)}
    rows: list[tuple[str, int]] = []
    for name, files in listing.items():
        if name not in number or not files:
            what = "is no class of the training folder" if name not in number else "has no image"
            raise DataError(f"{part}/{name}: this folder {what}.", "Restore the folders from the official archive.")
        rows += [(f"{part}/{name}/{file}", number[name]) for file in files]
    return rows


def assembled(
    info: DatasetInfo, folder: Path, rows: Rows, splits: Mapping[str, IntArray], classes: Sequence[str], files: str
) -> DomainData:
    """The loaded set; ``files`` says what lies in the folder."""
    labels = np.fromiter((label for _, label in rows), np.int64, len(rows))
    metadata = np.stack([np.zeros_like(labels), labels], axis=1)
    ordered = {name: np.sort(own).astype(np.int64) for name, own in splits.items()}
    value_names: dict[str, tuple[str, ...]] = {"domain": ("all",), "y": tuple(classes)}
    value_names |= {"_miniature": ("yes",)} if (folder / MARKER).is_file() else {}
    arrays = {"metadata": metadata, **{f"split/{name}": own for name, own in ordered.items()}}
    texts = {key: list(values) for key, values in value_names.items()}
    digest = digest_arrays(arrays, name=info.name, files=files, value_names=texts)
    images = ImageFiles(folder, [name for name, _ in rows], None)
    return DomainData(info, images, labels, metadata, FIELDS, ordered, digest, value_names)


def files_of(folder: Path, *parts: str) -> str:
    """One sha256 over what was found out about the parts, and whether the set is generated."""
    return hashlib.sha256(json.dumps([*parts, (folder / MARKER).is_file()]).encode()).hexdigest()


def draw_classes(folder: Path, part: str, count: int, rng: np.random.Generator) -> None:
    """``count`` generated images for each of :data:`WNIDS` below ``folder/part``."""
    for label, name in enumerate(WNIDS):
        for shot in range(count):
            write_drawing(folder / part / name / f"{name}_{shot}.JPEG", label, rng)
