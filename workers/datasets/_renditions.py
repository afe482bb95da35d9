"""Test sets of renditions (art, cartoons, sculptures) of some classes of another set, as class folders.

There is nothing to train on. Layout: ``<folder>/<wnid>/<image>``. Labels are ranks in the sorted WordNet ids, by which
the logits of the larger set are found (``workers.m2mkd_evaluate``).
Source: Hendrycks et al. 2021, The Many Faces of Robustness (arXiv 2006.16241).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.errors import DataError, NotFoundError
from workers.datasets import _miniatures as paint
from workers.datasets._class_folders import assembled, class_rows, files_of
from workers.datasets._class_lists import class_lists
from workers.datasets._folder_index import folder_index, subfolders
from workers.datasets._listed_images import PlainOptions
from workers.datasets._photo_drawings import write_drawing
from workers.datasets._taken_in import take_in
from workers.datasets._wilds import MARKER
from workers.datasets.base import DatasetInfo, DomainData, Missing

HERE = "."


@dataclass(frozen=True)
class RenditionSet:
    """The functions of the dataset contract for one set.

    Attributes:
        info: its record.
        folder: name below the data root.
        classes: list of its WordNet ids (``class_lists``).
        drawn: WordNet ids of the generated stand-in, which the stand-in of the larger set has too.
    """

    info: DatasetInfo
    folder: str
    classes: str
    drawn: Sequence[str]

    def load(self, root: Path, options: PlainOptions) -> DomainData:
        """All images as ``test``; ``train`` and ``val`` are empty.

        Raises:
            NotFoundError: the folder is not there.
            DataError: class folders that are empty, missing or not of this set.
        """
        folder = self._require(root)
        index = folder_index(folder, (HERE,))
        listing = index.classes[HERE]
        known = class_lists()[self.classes]
        strange, lost = sorted(set(listing) - set(known)), sorted(set(known) - set(listing))
        if strange or (lost and not (folder / MARKER).is_file()):
            raise DataError(
                f"{folder}: {len(strange)} class folders do not belong there ({', '.join(strange[:3])}), "
                f"{len(lost)} of {len(known)} are missing ({', '.join(lost[:3])}).",
                "Restore the folders from the official archive.",
            )
        names = sorted(listing)
        rows = class_rows(HERE, {name: listing[name] for name in names}, names)
        none = np.empty(0, np.int64)
        splits = {"train": none, "val": none, "test": np.arange(len(rows))}
        return assembled(self.info, folder, rows, splits, names, files_of(folder, index.sha256))

    def fingerprint(self, root: Path, options: PlainOptions) -> str:
        """What the files are, for cache keys while planning. Raises NotFoundError."""
        folder = self._require(root)
        return files_of(folder, folder_index(folder, (HERE,)).sha256)

    def missing(self, root: Path) -> list[Missing]:
        """The folder, when it is not there or has no class folders."""
        folder, name = root / self.folder, self.info.name
        fix = (
            f"Put the class folders at {folder} or run `moepipe data import {name} FOLDER`; `moepipe data miniature "
            f"{name}` makes a small generated stand-in."
        )
        return [] if folder.is_dir() and subfolders(folder) else [Missing(f"class folders in {folder}", fix)]

    def import_archive(self, root: Path, archive: Path) -> Path:
        """Link a folder of class folders, or take an archive of it in. Raises as :func:`take_in`."""

        def is_set(folder: Path) -> bool:
            return sum(name[:1] == "n" and name[1:].isdecimal() for name in subfolders(folder)) > 1

        return take_in(root / self.folder, self.info.name, archive, is_set, "class folders n01443537, ...")

    def miniature(self, root: Path, seed: int) -> None:
        """Write a generated set of some classes in the official layout."""

        def generate(folder: Path, seed: int) -> None:
            rng = np.random.default_rng([seed, 9])
            for label, name in enumerate(self.drawn):
                for shot in range(6):
                    write_drawing(folder / name / f"art_{shot}.jpg", label, rng)

        paint.write_set(root / self.folder, self.info.name, seed, generate)

    def _require(self, root: Path) -> Path:
        gaps = self.missing(root)
        if gaps:
            raise NotFoundError(f"{self.info.name}: missing {gaps[0].what}.", gaps[0].fix)
        return root / self.folder
