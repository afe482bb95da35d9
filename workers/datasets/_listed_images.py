"""Sets of one domain whose official tables list images on disk (Flowers-102, Pets, DTD, Food-101), and their splits.

A set keeps torchvision's layout: its folder below the data root holds tables and an image folder. What the tables list
must be there and be as many images as the official release has; a generated stand-in may have fewer.

``train`` and ``test`` are the official ones. ``val`` is the official one where there is one, else a random part of the
training images: no result is chosen on test images.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import DataError, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._arrays import digest_arrays, held_out
from workers.datasets._taken_in import take_in
from workers.datasets._wilds import MARKER, ImageFiles
from workers.datasets._wilds_files import files_digest
from workers.datasets.base import DatasetInfo, DomainData, IntArray, Missing

FIELDS = ("domain", "y")
_FORMAT = 1  # of the digest


class PlainOptions(BaseModel):
    """What a user may choose of a set with official validation images: nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HeldOutOptions(PlainOptions):
    """What a user may choose of a set without official validation images."""

    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images kept as `val`")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of that split")


def photo_info(
    name: str, classes: int, title: str, *, side: int = 224, licence: str, source: str, citation: str
) -> DatasetInfo:
    """The record of a set of RGB photographs in one domain."""
    return DatasetInfo(
        name=name,
        title=title,
        task="multiclass",
        num_outputs=classes,
        channels=3,
        image_size=(side, side),
        domain_field="domain",
        group_fields=("domain",),
        metrics=("accuracy", "macro_f1"),
        selection_metric="accuracy",
        normalisation="imagenet",
        licence=licence,
        source=source,
        citation=citation,
    )


@dataclass(frozen=True)
class Listing:
    """What the tables of a set say.

    Attributes:
        names: path of every row's image below the set's folder.
        labels: class of every row, int64 ``[N]``.
        splits: official splits, ``train``, ``test`` and perhaps ``val``; ascending rows.
        classes: names of the classes; empty when the tables do not tell.
    """

    names: Sequence[str]
    labels: IntArray
    splits: Mapping[str, IntArray]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListedSet:
    """The functions of the dataset contract for one set.

    Attributes:
        info: its record.
        folder: name below the data root.
        images: image folder in it.
        sizes: split -> images of the official release.
        tables: names of the tables in the folder, by options (None: those that every option needs).
        read: the tables, by options; raises DataError.
        draw: writes a generated stand-in into an empty folder.
        get: in words, how one gets the official files.
    """

    info: DatasetInfo
    folder: str
    images: str
    sizes: Mapping[str, int]
    tables: Callable[[Any], Sequence[str]]
    read: Callable[[Path, Any], Listing]
    draw: Callable[[Path, np.random.Generator], None]
    get: str

    def missing(self, root: Path) -> list[Missing]:
        """Tables and the image folder that are not there, each with what to do."""
        folder, name = root / self.folder, self.info.name
        fix = (
            f"{self.get} Put it at {folder} or run `moepipe data import {name} FOLDER_OR_ARCHIVE`; `moepipe data "
            f"miniature {name}` makes a small generated stand-in."
        )
        gaps = [Missing(f"file {folder / table}", fix) for table in self.tables(None) if not (folder / table).is_file()]
        if not (folder / self.images).is_dir():
            gaps.append(Missing(f"image folder {folder / self.images}", fix))
        return gaps

    def load(self, root: Path, options: PlainOptions) -> DomainData:
        """Read the tables; images are decoded on access, uint8 ``[H, W, 3]`` of their own sizes.

        Raises:
            NotFoundError: tables or images are not there.
            DataError: tables that are damaged or contradict each other, or images that are missing.
        """
        folder = self._require(root)
        listing = self.read(folder, options)
        generated = (folder / MARKER).is_file()
        self._check(folder, listing, generated)
        splits = with_validation(listing.splits, options)
        metadata = np.stack([np.zeros_like(listing.labels), listing.labels], axis=1)
        value_names: dict[str, tuple[str, ...]] = {"domain": ("all",)}
        value_names |= {"y": listing.classes} if listing.classes else {}
        value_names |= {"_miniature": ("yes",)} if generated else {}
        arrays = {"metadata": metadata, **{f"split/{name}": rows for name, rows in splits.items()}}
        files = files_digest(folder, self.tables(options), self.images, listing.names)
        texts = {key: list(values) for key, values in value_names.items()}
        digest = digest_arrays(arrays, name=self.info.name, files=files, value_names=texts, format=_FORMAT)
        images = ImageFiles(folder, listing.names, None)
        return DomainData(self.info, images, listing.labels, metadata, FIELDS, splits, digest, value_names)

    def fingerprint(self, root: Path, options: PlainOptions) -> str:
        """What the files are, for cache keys while planning. Raises NotFoundError."""
        folder = self._require(root)
        files = files_digest(folder, self.tables(options), self.images)
        header = [_FORMAT, self.folder, files, (folder / MARKER).is_file()]
        return hashlib.sha256(json.dumps(header).encode()).hexdigest()

    def import_archive(self, root: Path, archive: Path) -> Path:
        """Take an archive in, or link an unpacked folder; the set may lie deeper in it.

        Raises:
            NotFoundError: ``archive`` does not exist.
            DataError: it is damaged, unsafe, isn't this set, or the set is there already.
            EnvironmentProblem: the disk is full or not writable.
        """
        tables = self.tables(None)

        def is_set(folder: Path) -> bool:
            return all((folder / table).is_file() for table in tables) and (folder / self.images).is_dir()

        wanted = f"{', '.join(tables)} and {self.images}/"
        return take_in(root / self.folder, self.info.name, archive, is_set, wanted)

    def miniature(self, root: Path, seed: int) -> None:
        """Write a small generated set in the official layout."""

        def generate(folder: Path, seed: int) -> None:
            self.draw(folder, np.random.default_rng([seed, *self.info.name.encode()]))

        paint.write_set(root / self.folder, self.info.name, seed, generate)

    def _require(self, root: Path) -> Path:
        gaps = self.missing(root)
        if gaps:
            raise NotFoundError(f"{self.info.name}: missing {', '.join(gap.what for gap in gaps)}.", gaps[0].fix)
        return root / self.folder

    def _check(self, folder: Path, listing: Listing, generated: bool) -> None:
        restore = "Restore the tables from the official release."
        for name, rows in listing.splits.items():
            if not len(rows) or (not generated and len(rows) != self.sizes[name]):
                raise DataError(f"{folder}: {name} lists {len(rows):,} images, not {self.sizes[name]:,}.", restore)
        if len(set(listing.names)) < len(listing.names):
            (twice, _), *_ = Counter(listing.names).most_common(1)
            raise DataError(f"{folder}: the tables list {twice} twice.", restore)
        check_labels(folder, listing.labels, self.info.num_outputs)


def check_labels(where: Path, labels: IntArray, classes: int) -> None:
    """Raises DataError for a class that does not exist."""
    if not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"{where}: classes reach from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}.",
            "Restore the files from the official release.",
        )


def with_validation(official: Mapping[str, IntArray], options: PlainOptions) -> dict[str, IntArray]:
    """The official splits, with a random part of ``train`` as ``val`` where there is none; ascending rows."""
    splits = dict(official)
    if isinstance(options, HeldOutOptions):
        rng = np.random.default_rng([options.seed, 6])
        splits["train"], splits["val"] = held_out(official["train"], options.val_fraction, rng)
    return {name: np.sort(splits[name]).astype(np.int64) for name in ("train", "val", "test")}


def listed(parts: Mapping[str, Sequence[tuple[str, int]]], classes: tuple[str, ...] = ()) -> Listing:
    """A listing from split -> (image path, class) pairs, rows in that order."""
    names = [name for part in parts.values() for name, _ in part]
    labels = np.array([label for part in parts.values() for _, label in part], np.int64)
    ends = np.cumsum([len(part) for part in parts.values()])
    splits = {
        split: np.arange(end - len(parts[split]), end, dtype=np.int64) for split, end in zip(parts, ends, strict=True)
    }
    return Listing(names, labels, splits, classes)


def lines_of(path: Path) -> list[str]:
    """Lines of a text table, without empty ones.

    Raises:
        DataError: it is not text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text table ({error}).", "Restore it from the official release.") from error


def read_mat(path: Path, *names: str) -> tuple[Any, ...]:
    """Variables of a MATLAB file (version 5); nothing in such a file is run.

    Raises:
        DataError: damaged, of another format, or without a variable.
    """
    from scipy.io import loadmat

    try:
        record = loadmat(path, squeeze_me=True, variable_names=list(names))
    except Exception as error:  # scipy raises whatever the parsing of damaged bytes meets
        raise DataError(
            f"{path} is damaged or no MATLAB file ({type(error).__name__}: {error}).", "Get it again."
        ) from error
    lost = [name for name in names if name not in record]
    if lost:
        raise DataError(f"{path} holds no {', '.join(lost)}.", "Restore it from the official release.")
    return tuple(record[name] for name in names)
