"""imagenet21k: ImageNet-21k as class folders, whatever release: 21,841 classes (2011) or a cleaned part of them.

Layout: ``imagenet21k/<wnid>/*.JPEG``, or ``imagenet21k/{train,val}/<wnid>/*.JPEG`` (ImageNet-21K-P), whose ``val`` is
``test`` here; without it a part is held out. The number of classes is that of the folders.
Sources: Deng et al. 2009, ImageNet; Ridnik et al. 2021, ImageNet-21K Pretraining for the Masses (arXiv 2104.10972).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from moe.errors import DataError, NotFoundError, SpecError
from workers.datasets import _miniatures as paint
from workers.datasets._arrays import held_out
from workers.datasets._class_folders import assembled, class_rows, draw_classes, files_of
from workers.datasets._folder_index import FolderIndex, folder_index, subfolders
from workers.datasets._listed_images import HeldOutOptions, photo_info, with_validation
from workers.datasets._taken_in import take_in
from workers.datasets.base import DomainData, Missing

FOLDER, CLASSES = "imagenet21k", 21_841
HERE = "."

INFO = photo_info(
    "imagenet21k",
    CLASSES,
    "ImageNet-21k: photographs of up to 21,841 classes as folders, one domain",
    licence="non-commercial research (terms of image-net.org)",
    source="official archives, as class folders",
    citation="Deng et al. 2009, ImageNet: A Large-Scale Hierarchical Image Database",
)


class Options(HeldOutOptions):
    """What a user may choose."""

    val_fraction: float = Field(0.01, gt=0, lt=1, description="share of the training images kept as `val`")
    test_fraction: float = Field(0.01, gt=0, lt=1, description="share held out as `test` where there is no folder val")


def load(root: Path, options: Options) -> DomainData:
    """Read the folders; ``info.num_outputs`` is their number.

    Raises:
        NotFoundError: the folder is not there or empty.
        DataError: class folders that are empty, too many or not in ``train``.
        SpecError: ``test_fraction`` of a set with a folder ``val``.
    """
    folder = _require(root)
    index = _index(folder)
    first, *others = index.classes.values()
    classes = tuple(first)
    if not 2 <= len(classes) <= CLASSES:
        raise DataError(f"{folder} has {len(classes):,} class folders, expected 2 to {CLASSES:,}.")
    parts = [class_rows(part, listing, classes) for part, listing in index.classes.items()]
    rows = [row for part in parts for row in part]
    numbers = np.arange(len(parts[0]))
    if others:
        if options.test_fraction != Options.model_fields["test_fraction"].default:
            raise SpecError(
                f"imagenet21k: test_fraction={options.test_fraction} has no effect, {folder} has a folder val.",
                "Leave it out: that folder is `test`.",
            )
        official = {"train": numbers, "test": np.arange(len(parts[0]), len(rows))}
    else:
        rng = np.random.default_rng([options.seed, 7])
        official = dict(zip(("train", "test"), held_out(numbers, options.test_fraction, rng), strict=True))
    info = replace(INFO, num_outputs=len(classes))
    return assembled(info, folder, rows, with_validation(official, options), classes, files_of(folder, index.sha256))


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning. Raises NotFoundError."""
    folder = _require(root)
    return files_of(folder, _index(folder).sha256)


def missing(root: Path) -> list[Missing]:
    """The folder, when it is not there or has no class folders."""
    folder = root / FOLDER
    fix = (
        f"Put the class folders at {folder} or run `moepipe data import imagenet21k FOLDER`; `moepipe data miniature "
        "imagenet21k` makes a small generated stand-in."
    )
    return [] if folder.is_dir() and subfolders(folder) else [Missing(f"class folders in {folder}", fix)]


def import_archive(root: Path, archive: Path) -> Path:
    """Link a folder of class folders (or of train and val), or take an archive of it in. Raises as :func:`take_in`."""

    def is_set(folder: Path) -> bool:
        inside = subfolders(folder)
        return "train" in inside or sum(name[:1] == "n" and name[1:].isdecimal() for name in inside) > 1

    return take_in(root / FOLDER, "imagenet21k", archive, is_set, "class folders n01440764, ... or train/")


def miniature(root: Path, seed: int) -> None:
    """Write a generated set of 12 classes in the official layout."""

    def generate(folder: Path, seed: int) -> None:
        draw_classes(folder, "", 20, np.random.default_rng([seed, 8]))

    paint.write_set(root / FOLDER, "imagenet21k", seed, generate)


def _require(root: Path) -> Path:
    gaps = missing(root)
    if gaps:
        raise NotFoundError(f"imagenet21k: missing {gaps[0].what}.", gaps[0].fix)
    return root / FOLDER


def _index(folder: Path) -> FolderIndex:
    inside = subfolders(folder)
    return folder_index(folder, [part for part in ("train", "val") if part in inside] if "train" in inside else [HERE])
