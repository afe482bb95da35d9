"""tiny_imagenet: photographs of 200 ImageNet classes at 64x64; its 10,000 validation images are ``test`` here.

Layout of the official archive: ``tiny-imagenet-200/train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG`` with their
classes in ``val/val_annotations.txt``. ``val`` may also be sorted into class folders, as the public code wants it. The
official test images have no labels and are left alone.
Source: Le and Yang 2015, Tiny ImageNet Visual Recognition Challenge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from moe.errors import DataError, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._class_folders import Rows, assembled, class_rows, files_of
from workers.datasets._class_lists import class_lists
from workers.datasets._folder_index import folder_index
from workers.datasets._listed_images import HeldOutOptions, lines_of, photo_info, with_validation
from workers.datasets._photo_drawings import write_drawing
from workers.datasets._taken_in import take_in
from workers.datasets._wilds import MARKER
from workers.datasets._wilds_files import files_digest
from workers.datasets.base import DomainData, Missing

FOLDER, CLASSES, SIDE = "tiny-imagenet-200", 200, 64
ANNOTATIONS, FLAT = "val/val_annotations.txt", "val/images"
DRAWN = class_lists()["tiny-imagenet-r"][:12]
"""Classes of the generated stand-in."""

INFO = photo_info(
    "tiny_imagenet",
    CLASSES,
    "Tiny-ImageNet: photographs of 200 classes, 64x64, one domain; the validation folder is the test split",
    side=SIDE,
    licence="non-commercial research (terms of image-net.org)",
    source="official archive tiny-imagenet-200.zip",
    citation="Le and Yang 2015, Tiny ImageNet Visual Recognition Challenge",
)


class Options(HeldOutOptions):
    """What a user may choose."""

    val_fraction: float = Field(0.02, gt=0, lt=1, description="share of the training images kept as `val`")


def load(root: Path, options: Options) -> DomainData:
    """Training images, a part of them as ``val``, and the official validation images as ``test``.

    Raises:
        NotFoundError: a folder or the annotations are not there.
        DataError: class folders that are empty, missing or not of this set, or annotations that do not fit the images.
    """
    folder = _require(root)
    listing, found, files = _found(folder)
    classes = sorted(listing)
    known, generated = set(class_lists()["tiny-imagenet-200"]), (folder / MARKER).is_file()
    if not set(classes) <= known or (len(classes) != CLASSES and not generated):
        raise DataError(
            f"{folder / 'train'} has {len(classes)} class folders, {len(set(classes) - known)} of them of other sets; "
            f"expected the {CLASSES} of Tiny-ImageNet.",
            "Restore the folders from tiny-imagenet-200.zip.",
        )
    number = {name: label for label, name in enumerate(classes)}
    strange = sorted({name for _, name in found} - number.keys())
    if strange:
        raise DataError(f"{folder / 'val'}: the classes {', '.join(strange[:3])} are not in train.")
    train = class_rows("train", listing, classes)
    rows = [*train, *((path, number[name]) for path, name in found)]
    official = {"train": np.arange(len(train)), "test": np.arange(len(train), len(rows))}
    return assembled(INFO, folder, rows, with_validation(official, options), classes, files)


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning. Raises as :func:`load`."""
    return _found(_require(root))[2]


def missing(root: Path) -> list[Missing]:
    """Folders that are not there, and the classes of a flat ``val``."""
    folder = root / FOLDER
    fix = (
        f"Unpack tiny-imagenet-200.zip at {folder} or run `moepipe data import tiny_imagenet FOLDER_OR_ARCHIVE`; "
        "`moepipe data miniature tiny_imagenet` makes a small generated stand-in."
    )
    gaps = [Missing(f"folder {folder / part}", fix) for part in ("train", "val") if not (folder / part).is_dir()]
    if not gaps and (folder / FLAT).is_dir() and not (folder / ANNOTATIONS).is_file():
        gaps.append(Missing(f"file {folder / ANNOTATIONS}", fix))
    return gaps


def import_archive(root: Path, archive: Path) -> Path:
    """Link a folder with ``train`` and ``val``, or take the archive in. Raises as :func:`take_in`."""

    def is_set(folder: Path) -> bool:
        return (folder / "train").is_dir() and (folder / "val").is_dir()

    return take_in(root / FOLDER, "tiny_imagenet", archive, is_set, "train/ and val/")


def miniature(root: Path, seed: int) -> None:
    """Write a generated set of 12 classes in the official layout."""

    def generate(folder: Path, seed: int) -> None:
        rng = np.random.default_rng([seed, 4])
        lines = []
        for label, name in enumerate(DRAWN):
            for shot in range(12):
                write_drawing(folder / f"train/{name}/images/{name}_{shot}.JPEG", label, rng)
        for image, label in enumerate(rng.permutation(np.arange(4 * len(DRAWN)) % len(DRAWN))):
            write_drawing(folder / f"{FLAT}/val_{image}.JPEG", int(label), rng)
            lines.append(f"val_{image}.JPEG\t{DRAWN[label]}\t0\t0\t63\t63\n")
        (folder / ANNOTATIONS).write_text("".join(lines))

    paint.write_set(root / FOLDER, "tiny_imagenet", seed, generate)


def _require(root: Path) -> Path:
    gaps = missing(root)
    if gaps:
        raise NotFoundError(f"tiny_imagenet: missing {', '.join(gap.what for gap in gaps)}.", gaps[0].fix)
    return root / FOLDER


def _found(folder: Path) -> tuple[Mapping[str, Sequence[str]], list[tuple[str, str]], str]:
    """Training class -> files, (path, wnid) of the validation images, and what the files are."""
    if (folder / FLAT).is_dir():
        index = folder_index(folder, ("train",))
        flat = _annotated(folder)
        digest = files_digest(folder, (ANNOTATIONS,), FLAT, [path for path, _ in flat])
        return index.classes["train"], flat, files_of(folder, index.sha256, digest)
    index = folder_index(folder, ("train", "val"))
    classes = sorted(index.classes["val"])
    rows: Rows = class_rows("val", index.classes["val"], classes)
    return index.classes["train"], [(path, classes[label]) for path, label in rows], files_of(folder, index.sha256)


def _annotated(folder: Path) -> list[tuple[str, str]]:
    """(path, wnid) of the images of a flat ``val``, in the order of the annotations."""
    rows = [line.split("\t") for line in lines_of(folder / ANNOTATIONS)]
    short = [number for number, row in enumerate(rows, start=1) if len(row) < 2]
    names = {row[0] for row in rows}
    present = {path.name for path in (folder / FLAT).iterdir() if not path.name.startswith(".")}
    if short or len(names) != len(rows) or names != present:
        raise DataError(
            f"{folder / ANNOTATIONS} has {len(rows)} lines ({len(short)} without a class), {folder / FLAT} "
            f"{len(present)} images; {len(names ^ present)} names are in one of them only.",
            "Restore both from tiny-imagenet-200.zip.",
        )
    return [(f"{FLAT}/{row[0]}", row[1]) for row in rows]
