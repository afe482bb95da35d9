"""What the five WILDS sets share: where they lie, their images, and the step from a ``wilds`` object to DomainData.

A set lies in ``<data root>/<name>_v<version>/`` exactly as its official archive unpacks, or in the same folder below
``<data root>/wilds/``. The ``wilds`` package decides splits and metadata; images are decoded here, by its path rules,
so that a broken file is named.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, NotFoundError
from workers.datasets._wilds_files import files_digest
from workers.datasets.base import DatasetInfo, DomainData, Images, IntArray, Missing

MARKER = "MINIATURE.json"  # beside RELEASE_*.txt in a generated set
_FORMAT = 1  # of the digest


@dataclass(frozen=True)
class Layout:
    """The official folder of one set.

    Attributes:
        name: name in ``wilds``.
        version: the version this project reads.
        tables: CSV files it must hold; the first one lists the images.
        images: folder with the images.
    """

    name: str
    version: str
    tables: tuple[str, ...]
    images: str

    @property
    def folder(self) -> str:
        """``<name>_v<version>``, the folder below the data root."""
        return f"{self.name}_v{self.version}"

    @property
    def release(self) -> str:
        """File by which ``wilds`` recognises a complete set; its content is free."""
        return f"RELEASE_v{self.version}.txt"


def home(root: Path, layout: Layout) -> Path:
    """Folder that holds ``layout.folder``: ``root/wilds`` when the set lies there, else ``root``."""
    nested = root / "wilds"
    return nested if not (root / layout.folder).is_dir() and (nested / layout.folder).is_dir() else root


def missing(root: Path, layout: Layout) -> list[Missing]:
    """What the set lacks below ``root``, each with the command that gets it; images are only checked as a folder."""
    folder = home(root, layout) / layout.folder
    get = (
        f"Get the official archive (see {layout.name} in docs/wilds.md) and run `moepipe data import {layout.name} "
        f"ARCHIVE`, or make a small generated stand-in with `moepipe data miniature {layout.name}`."
    )
    if not folder.is_dir():
        return [Missing(f"folder {folder}", get)]
    lacking = [Missing(f"file {folder / name}", get) for name in layout.tables if not (folder / name).is_file()]
    if not (folder / layout.images).is_dir():
        lacking.append(Missing(f"image folder {folder / layout.images}", get))
    if not lacking and not (folder / layout.release).is_file():
        fix = "It closes the official archive, so unpacking was probably interrupted. " + get
        lacking.append(Missing(f"file {folder / layout.release}", fix))
    return lacking


def require(root: Path, layout: Layout) -> Path:
    """Folder of the set.

    Raises:
        NotFoundError: something of :func:`missing` is not there.
    """
    lacking = missing(root, layout)
    if lacking:
        raise NotFoundError(f"{layout.name}: missing {', '.join(item.what for item in lacking)}.", lacking[0].fix)
    return home(root, layout) / layout.folder


def fingerprint(root: Path, layout: Layout) -> str:
    """Sha256 of what the set's files are, without reading them in: for cache keys while planning.

    Raises:
        NotFoundError: the set is not there.
    """
    folder = require(root, layout)
    files = files_digest(folder, layout.tables, layout.images)
    header = [_FORMAT, layout.folder, files, (folder / MARKER).is_file()]
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


@dataclass(frozen=True)
class ImageFiles:
    """RGB images on disk, decoded on access as uint8 ``[H, W, 3]``.

    Attributes:
        folder: the set's folder.
        names: path of every row's image below it, with forward slashes.
        size: (height, width) every image must have; None when the set has images of many sizes.
    """

    folder: Path
    names: Sequence[str]
    size: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """Decode one image; DataError naming the file when it is missing, corrupt or of another size."""
        from PIL import Image

        path = self.folder / self.names[row]
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow raises many kinds, struct.error among them
            raise unreadable(path, error) from error
        if self.size is not None and pixels.shape[:2] != self.size:
            raise DataError(
                f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {self.size[1]} x {self.size[0]}.",
                "Restore the file from the official archive.",
            )
        return pixels


def unreadable(path: Path, error: Exception) -> DataError:
    """The DataError for an image that could not be decoded. An unrelated error (too many open files) is re-raised."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: image is missing.", "Restore the file from the official archive.")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    return DataError(
        f"{path}: image cannot be decoded ({type(error).__name__}: {error}).",
        "Restore the file from the official archive; `moepipe data verify` lists all broken ones.",
    )


def open_dataset(layout: Layout, folder: Path, **options: Any) -> Any:
    """The ``wilds`` object over ``folder``; its tables must have been checked.

    Raises:
        DataError: ``wilds`` refuses them all the same.
    """
    from workers import wilds_compat

    try:
        return wilds_compat.open_dataset(layout.name, str(folder.parent), **options)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder}: the wilds package refuses this set ({type(error).__name__}: {error}).",
            "Restore its tables from the official archive.",
        ) from error


def assemble(
    info: DatasetInfo,
    layout: Layout,
    folder: Path,
    dataset: Any,
    images: Images,
    names: Sequence[str],
    value_names: Mapping[str, tuple[str, ...]],
) -> DomainData:
    """DomainData from a constructed ``wilds`` data set.

    Args:
        info: the set's record.
        layout: its layout.
        folder: where it lies.
        dataset: the ``wilds`` object; gives labels, metadata and splits.
        images: N images in the order of its rows.
        names: their paths below ``folder``; they and the files' sizes enter the digest, pixels don't.
        value_names: names of metadata values; those of a generated set get ``_miniature``.

    Raises:
        DataError: image files are missing, a split is empty, or there are more classes than outputs.
    """
    regression = info.task == "regression"
    labels: NDArray[np.generic] = dataset.y_array.numpy().reshape(len(dataset))
    labels = labels.astype(np.float32 if regression else np.int64)
    # Regression targets are real numbers and have no place among integer metadata; they are in `labels`.
    fields = tuple(field for field in dataset.metadata_fields if not (regression and field == "y"))
    columns = [dataset.metadata_fields.index(field) for field in fields]
    metadata: IntArray = dataset.metadata_array.numpy()[:, columns].astype(np.int64)
    splits = {
        split: np.flatnonzero(np.asarray(dataset.split_array) == number).astype(np.int64)
        for split, number in dataset.split_dict.items()
    }
    _check(info, folder / layout.tables[0], labels, splits)
    generated = (folder / MARKER).is_file()
    digest = hashlib.sha256()
    header = [_FORMAT, layout.folder, fields, labels.dtype.str, labels.shape, metadata.shape, generated]
    digest.update(json.dumps(header).encode())
    for array in (labels, metadata):
        digest.update(np.ascontiguousarray(array).tobytes())
    for split in sorted(splits):
        digest.update(f"{split}={len(splits[split])};".encode())
        digest.update(splits[split].tobytes())
    digest.update(files_digest(folder, layout.tables, layout.images, names).encode())
    return DomainData(
        info=info,
        images=images,
        labels=labels,
        metadata=metadata,
        fields=fields,
        splits=splits,
        digest=digest.hexdigest(),
        value_names={**value_names, **({"_miniature": ("yes",)} if generated else {})},
    )


def _check(info: DatasetInfo, table: Path, labels: NDArray[np.generic], splits: Mapping[str, IntArray]) -> None:
    for split, rows in splits.items():
        if not len(rows):
            raise DataError(
                f"{table}: no row belongs to split {split!r}.", "Restore the file from the official archive."
            )
    if info.task == "multiclass" and int(labels.max()) >= info.num_outputs:
        raise DataError(f"{table}: label {labels.max()} found, {info.name} has classes 0 to {info.num_outputs - 1}.")
