"""imagenet: ImageNet-1k (ILSVRC 2012), photographs of 1,000 classes; its 50,000 validation images are ``test`` here.

Layout as torchvision's ``ImageNet``: ``imagenet/{train,val}/<wnid>/*.JPEG``. ``val`` may also be flat, as its official
archive unpacks; classes then come from ``imagenet_2012_validation_synset_labels.txt`` (one wnid a line, in the order
of the file names) or from the devkit (folder ``ILSVRC2012_devkit_t12``), whichever lies in ``imagenet``.
Source: Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge (arXiv 1409.0575).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from moe.errors import DataError, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._class_folders import WNIDS, Rows, assembled, class_rows, draw_classes, files_of
from workers.datasets._folder_index import folder_index, subfolders
from workers.datasets._listed_images import HeldOutOptions, lines_of, photo_info, read_mat, with_validation
from workers.datasets._photo_drawings import write_drawing
from workers.datasets._taken_in import take_in
from workers.datasets._wilds import MARKER
from workers.datasets._wilds_files import files_digest
from workers.datasets.base import DomainData, Missing

FOLDER, CLASSES, VALIDATION = "imagenet", 1000, 50_000
SYNSETS = "imagenet_2012_validation_synset_labels.txt"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
META = "ILSVRC2012_devkit_t12/data/meta.mat"

INFO = photo_info(
    "imagenet",
    CLASSES,
    "ImageNet-1k: photographs of 1,000 classes, one domain; the validation folder is the test split",
    licence="non-commercial research (terms of image-net.org)",
    source="official archives ILSVRC2012_img_{train,val}, as class folders",
    citation="Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge",
)


class Options(HeldOutOptions):
    """What a user may choose."""

    val_fraction: float = Field(0.01, gt=0, lt=1, description="share of the training images kept as `val`")


def load(root: Path, options: Options) -> DomainData:
    """Training images, a part of them as ``val``, and the official validation images as ``test``.

    Raises:
        NotFoundError: a folder is not there, or a flat ``val`` without its classes.
        DataError: wrong or empty class folders, or classes that do not fit the images.
    """
    folder = _require(root)
    listing, rows, files = _found(folder)
    classes = tuple(listing)
    if len(classes) != CLASSES and not (folder / MARKER).is_file():
        raise DataError(
            f"{folder / 'train'} has {len(classes)} class folders, not {CLASSES}.",
            "Unpack every archive inside ILSVRC2012_img_train.tar into a folder of its name.",
        )
    train = class_rows("train", listing, classes)
    number = {name: label for label, name in enumerate(classes)}
    strange = sorted({name for _, name in rows} - number.keys())
    if strange:
        raise DataError(f"{folder / 'val'}: the classes {', '.join(strange[:3])} are not in train.")
    test = [(path, number[name]) for path, name in rows]
    official = {"train": np.arange(len(train)), "test": np.arange(len(train), len(train) + len(test))}
    return assembled(INFO, folder, [*train, *test], with_validation(official, options), classes, files)


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning. Raises as :func:`load`."""
    return _found(_require(root))[2]


def missing(root: Path) -> list[Missing]:
    """Folders that are not there, and the classes of a flat ``val``."""
    folder = root / FOLDER
    stand_in = "`moepipe data miniature imagenet` makes a small generated stand-in."
    fix = f"Put train and val there as class folders, or run `moepipe data import imagenet FOLDER`; {stand_in}"
    gaps = [Missing(f"folder {folder / part}", fix) for part in ("train", "val") if not (folder / part).is_dir()]
    if not gaps and not subfolders(folder / "val") and not _has_classes(folder):
        fix = f"Unpack ILSVRC2012_devkit_t12.tar.gz at {folder}, or sort the images into class folders."
        gaps.append(Missing(f"classes of the flat folder {folder / 'val'}", fix))
    return gaps


def import_archive(root: Path, archive: Path) -> Path:
    """Link a folder with ``train`` and ``val``, or take an archive of it in. Raises as :func:`take_in`."""

    def is_set(folder: Path) -> bool:
        return (folder / "train").is_dir() and (folder / "val").is_dir()

    return take_in(root / FOLDER, "imagenet", archive, is_set, "train/ and val/")


def miniature(root: Path, seed: int) -> None:
    """Write a generated set of 12 classes: class folders in ``train``, a flat ``val`` with the devkit's tables."""

    def generate(folder: Path, seed: int) -> None:
        from scipy.io import savemat

        rng = np.random.default_rng([seed, 5])
        draw_classes(folder, "train", 12, rng)
        truth = rng.permutation(np.arange(4 * len(WNIDS)) % len(WNIDS))
        for image, label in enumerate(truth, start=1):
            write_drawing(folder / f"val/ILSVRC2012_val_{image:08d}.JPEG", int(label), rng)
        (folder / TRUTH).parent.mkdir(parents=True)
        numbers = rng.permutation(len(WNIDS)) + 1  # the devkit numbers classes in another order than wnids
        (folder / TRUTH).write_text("".join(f"{numbers[label]}\n" for label in truth))
        fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
        rows = [(number, name, name, name, 0) for number, name in zip(numbers, WNIDS, strict=True)]
        savemat(folder / META, {"synsets": np.array([*rows, (len(rows) + 1, "n0", "all", "all", len(rows))], fields)})

    paint.write_set(root / FOLDER, "imagenet", seed, generate)


def _require(root: Path) -> Path:
    gaps = missing(root)
    if gaps:
        raise NotFoundError(f"imagenet: missing {', '.join(gap.what for gap in gaps)}.", gaps[0].fix)
    return root / FOLDER


def _has_classes(folder: Path) -> bool:
    return (folder / SYNSETS).is_file() or ((folder / TRUTH).is_file() and (folder / META).is_file())


def _found(folder: Path) -> tuple[Mapping[str, Sequence[str]], list[tuple[str, str]], str]:
    """Training class -> files, (path, wnid) of the validation images, and what the files are."""
    if subfolders(folder / "val"):
        index = folder_index(folder, ("train", "val"))
        classes = sorted(index.classes["val"])
        rows: Rows = class_rows("val", index.classes["val"], classes)
        return index.classes["train"], [(path, classes[label]) for path, label in rows], files_of(folder, index.sha256)
    index = folder_index(folder, ("train",))
    wnids, table = _flat_classes(folder)
    names = sorted(entry.name for entry in (folder / "val").iterdir() if entry.name.upper().endswith(".JPEG"))
    if len(names) != len(wnids) or (len(names) != VALIDATION and not (folder / MARKER).is_file()):
        raise DataError(
            f"{folder / 'val'} has {len(names):,} images and {table} {len(wnids):,} classes; both must be "
            f"{VALIDATION:,}.",
            "Restore them from ILSVRC2012_img_val.tar and the devkit.",
        )
    flat = [(f"val/{name}", wnid) for name, wnid in zip(names, wnids, strict=True)]
    tables = (SYNSETS,) if (folder / SYNSETS).is_file() else (TRUTH, META)
    files = files_digest(folder, tables, "val", [path for path, _ in flat])
    return index.classes["train"], flat, files_of(folder, index.sha256, files)


def _flat_classes(folder: Path) -> tuple[list[str], Path]:
    """The wnid of every validation image in the order of file names, and the table that says so."""
    if (folder / SYNSETS).is_file():
        return lines_of(folder / SYNSETS), folder / SYNSETS
    (synsets,) = read_mat(folder / META, "synsets")
    try:
        leaves = np.asarray(synsets["num_children"], dtype=np.int64) == 0
        numbers = np.asarray(synsets["ILSVRC2012_ID"], dtype=np.int64)[leaves]
        wnid = {int(number): str(name) for number, name in zip(numbers, synsets["WNID"][leaves], strict=True)}
        return [wnid[int(line)] for line in lines_of(folder / TRUTH)], folder / TRUTH
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{folder / META} and {folder / TRUTH} do not fit each other ({type(error).__name__}: {error}).",
            "Restore both from ILSVRC2012_devkit_t12.tar.gz.",
        ) from error
