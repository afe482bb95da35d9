"""CIFAR-10 and CIFAR-100 in torchvision's layout: the folder of the official "python version" below the data root.

The files are pickles. They are read by an unpickler that knows arrays and nothing else, so no file can run code.
Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._arrays import domain_data, held_out
from workers.datasets._listed_images import photo_info
from workers.datasets._wilds import MARKER
from workers.datasets._wilds_archive import unpack
from workers.datasets.base import DatasetInfo, DomainData, IntArray, Missing

SIDE = 32
_KNOWN = {
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class CifarOptions(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images kept as `val`")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of that split")


def cifar_info(name: str, classes: int, title: str) -> DatasetInfo:
    """The record of one of the two sets."""
    return photo_info(
        name,
        classes,
        title,
        side=SIDE,
        licence="unstated; free for research",
        source="official archive, python version, in torchvision's layout",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
    )


@dataclass(frozen=True)
class CifarSet:
    """The functions of the dataset contract for one set.

    Attributes:
        info: its record.
        folder: name below the data root.
        train: files of the training images, in order.
        test: file of the test images.
        key: name of the labels in each file.
    """

    info: DatasetInfo
    folder: str
    train: tuple[str, ...]
    test: str
    key: str

    def load(self, root: Path, options: CifarOptions) -> DomainData:
        """Training images, a part of them as ``val``, and test images, in the order of the files.

        Raises:
            NotFoundError: a file is not there.
            DataError: a file is damaged or holds something else.
        """
        gaps = self.missing(root)
        if gaps:
            raise NotFoundError(f"{self.info.name} lacks {', '.join(gap.what for gap in gaps)}.", gaps[0].fix)
        parts = [self._read(root / self.folder / name) for name in (*self.train, self.test)]
        images = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        count = len(labels) - len(parts[-1][1])
        train, val = held_out(np.arange(count), options.val_fraction, np.random.default_rng([options.seed, 6]))
        names = {"domain": ("all",), **self._mark(root)}
        metadata = np.stack([np.zeros_like(labels), labels], axis=1)
        splits = {"train": train, "val": val, "test": np.arange(count, len(labels))}
        return domain_data(self.info, images, labels, metadata, ("domain", "y"), splits, names)

    def missing(self, root: Path) -> list[Missing]:
        """Files that are not there."""
        fix = f"Take your copy of the official archive in: moepipe data import {self.info.name} ARCHIVE_OR_FOLDER"
        return [
            Missing(f"{self.folder}/{name}", fix)
            for name in (*self.train, self.test)
            if not (root / self.folder / name).is_file()
        ]

    def import_archive(self, root: Path, archive: Path) -> Path:
        """Take the official archive, or a copy of its folder, into the data root.

        Raises:
            NotFoundError: it does not exist, or lacks a file.
            DataError: it is damaged or unsafe, or the set is there already.
            EnvironmentProblem: the disk is full or not writable.
        """
        target, aside = root / self.folder, root / f".{self.folder}.{os.getpid()}.import"
        if target.exists():
            raise DataError(f"{target} exists already.", "Remove it first to import another copy.")
        if not archive.exists():
            raise NotFoundError(f"{archive} does not exist.", f"Give the path of the {self.info.name} archive.")
        try:
            aside.mkdir(parents=True)
            if not archive.is_dir():
                unpack(archive, aside)
            inside = archive if archive.is_dir() else aside
            found = next((path.parent for path in sorted(inside.rglob(self.test)) if path.is_file()), None)
            lost = [name for name in (*self.train, self.test) if found is None or not (found / name).is_file()]
            if found is None or lost:
                raise NotFoundError(f"{archive} does not hold {', '.join(lost)}.", "Use the python version.")
            made = aside / "made"
            made.mkdir()
            for name in (*self.train, self.test):
                shutil.copyfile(found / name, made / name)
            os.replace(made, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise EnvironmentProblem(f"Cannot take {archive} in below {root}: {error.strerror}.") from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    def miniature(self, root: Path, seed: int) -> None:
        """Write a generated stand-in: a shape on a coloured ground for each class, some 20 images of each."""
        paint.write_set(root / self.folder, self.info.name, seed, self._generate)

    def _generate(self, folder: Path, seed: int) -> None:
        for number, name in enumerate((*self.train, self.test)):
            rng = np.random.default_rng([seed, number])
            count = 4 * self.info.num_outputs if len(self.train) > 1 else 16 * self.info.num_outputs
            labels = rng.permutation(np.arange(count) % self.info.num_outputs)
            pictures = np.stack([_drawing(int(label), rng) for label in labels])
            record = {"data": pictures.transpose(0, 3, 1, 2).reshape(count, -1), self.key: labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(record, protocol=2))

    def _read(self, path: Path) -> tuple[NDArray[np.uint8], IntArray]:
        """Images ``[N, 32, 32, 3]`` and labels ``[N]`` of a file."""
        try:
            with path.open("rb") as stream:
                record = _Unpickler(stream, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path} is damaged or no file of {self.info.name}: {error}.", "Import it again."
            ) from error
        data = record.get("data") if isinstance(record, Mapping) else None
        labels = record.get(self.key) if isinstance(record, Mapping) else None
        good = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3 * SIDE * SIDE,)
        if not good or not isinstance(labels, list) or not isinstance(data, np.ndarray) or len(labels) != len(data):
            raise DataError(f"{path} does not hold images and {self.key!r}.", "Import the python version again.")
        found = np.asarray(labels, dtype=np.int64)
        if len(found) and not 0 <= found.min() <= found.max() < self.info.num_outputs:
            raise DataError(f"{path}: labels reach from {found.min()} to {found.max()}.", "Import it again.")
        images: NDArray[np.uint8] = np.ascontiguousarray(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        return images, found

    def _mark(self, root: Path) -> dict[str, tuple[str, ...]]:
        return {"_miniature": ("yes",)} if (root / self.folder / MARKER).is_file() else {}


class _Unpickler(pickle.Unpickler):
    """Knows numpy's arrays, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """An allowed name."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not run")
        return super().find_class(module, name)


def _drawing(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A shape and colour that depend on the label, on a drawn ground."""
    canvas = paint.Canvas(paint.backdrop(rng, (SIDE, SIDE), paint.random_colour(rng, 60, 190), 30))
    centre = (float(rng.uniform(12, 20)), float(rng.uniform(12, 20)))
    canvas.shape(label % 8, centre, float(rng.uniform(14, 20)), paint.PALETTE[(label // 8) % len(paint.PALETTE)])
    return np.asarray(canvas.image, np.uint8)
