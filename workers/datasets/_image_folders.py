"""DomainBed's image sets on disk: ``<root>/<folder>/<domain>/<class>/<image>``, checked against what the set must hold.

Rows stand in the official order: domains sorted, classes sorted, files sorted (as torchvision's ``ImageFolder``).
Source: DomainBed's public code (commit b93c22a1).

Known differences: the public code makes a domain of every folder it finds and counts the classes of the last one, so a
stray folder or a lost class silently changes the task; here each is an error. It also decodes truncated images as far
as they go; here they are errors that name the file. Hidden folders are left out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from workers.datasets import _folder_drawings, _wilds
from workers.datasets import _miniatures as paint
from workers.datasets._arrays import digest_arrays
from workers.datasets._domain_splits import DomainOptions, domain_splits
from workers.datasets._folder_index import FolderIndex, folder_index, subfolders
from workers.datasets._wilds_archive import unpack
from workers.datasets.base import DatasetInfo, DomainData, IntArray, Missing
from workers.domainbed.benchmark_sets import BenchmarkSet, benchmark_set

Classes = Mapping[str, Mapping[str, Sequence[str]]]
FIELDS = ("domain", "y")
_FORMAT = 1  # of the digest
_DEPTH = 3  # folders that an archive may wrap around the domains


def folder_info(name: str, official: str, title: str, licence: str, citation: str) -> DatasetInfo:
    """The record of a set; classes, channels and size are those of DomainBed's table under the name ``official``."""
    entry = benchmark_set(official)
    return DatasetInfo(
        name=name,
        title=title,
        task="multiclass",
        num_outputs=entry.classes,
        channels=entry.channels,
        image_size=(entry.image_size, entry.image_size),
        domain_field="domain",
        group_fields=("domain",),
        metrics=("accuracy", "worst_domain_accuracy", "macro_f1"),
        selection_metric="accuracy",
        normalisation="imagenet",
        licence=licence,
        source=f"official archive in DomainBed's layout, folder {entry.folder}",
        citation=citation,
    )


@dataclass(frozen=True)
class FolderSet:
    """The functions of the dataset contract for one set.

    Attributes:
        info: its record.
        entry: what DomainBed's table says of it.
        classes: class names of the generated stand-in.
    """

    info: DatasetInfo
    entry: BenchmarkSet
    classes: tuple[str, ...]

    def home(self, root: Path) -> Path:
        """Folder of the set: below the data root, or ``root`` itself when somebody gave the set's own folder."""
        own = root / self.entry.folder
        if (
            not own.is_dir()
            and sum((root / name).is_dir() for name in self.entry.domains) > len(self.entry.domains) / 2
        ):
            return root
        return own

    def missing(self, root: Path) -> list[Missing]:
        """The set's folder or the domains that are not there, each with what to do."""
        folder, layout = self.home(root), f"{self.entry.folder}/<domain>/<class>/<image>"
        get = (
            f"Put the official folder there ({layout}; the data root is {root}), or run `moepipe data import "
            f"{self.info.name} ARCHIVE`, or make a small generated stand-in with `moepipe data miniature "
            f"{self.info.name}`."
        )
        if not folder.is_dir():
            return [Missing(f"folder {folder}", get)]
        lost = [name for name in self.entry.domains if not (folder / name).is_dir()]
        if len(lost) == len(self.entry.domains):
            inner = self._domains_in(folder)
            if inner is not None and inner != folder:
                return [Missing(f"domains in {folder}", f"They lie in {inner}: move them up, so that it is {layout}.")]
        return [Missing(f"domain folder {folder / name}", get) for name in lost]

    def load(self, root: Path, options: DomainOptions) -> DomainData:
        """Read the set.

        Images are uint8 ``[H, W, 3]`` of their own sizes; metadata columns are ``domain`` and ``y``.

        Args:
            root: data root, or the set's own folder.
            options: which domains are held out.

        Raises:
            NotFoundError: the folder or a domain is not there.
            DataError: a stray domain, unequal or wrong class lists, an empty class.
        """
        folder, index, listing = self._checked(root)
        names, labels, domain = _rows(listing)
        classes = tuple(next(iter(listing.values())))
        value_names: dict[str, tuple[str, ...]] = {"domain": self.entry.domains, "y": classes}
        if (folder / _wilds.MARKER).is_file():
            value_names["_miniature"] = ("yes",)
        splits = domain_splits(self.info.name, domain, self.entry.domains, options)
        metadata = np.stack([domain, labels], axis=1)
        files = self._files(folder, index, listing)
        arrays = {"metadata": metadata, **{f"split/{name}": rows for name, rows in splits.items()}}
        texts = {key: list(values) for key, values in value_names.items()}
        digest = digest_arrays(arrays, name=self.info.name, files=files, value_names=texts, format=_FORMAT)
        images = _wilds.ImageFiles(folder, names, None)
        return DomainData(self.info, images, labels, metadata, FIELDS, splits, digest, value_names)

    def fingerprint(self, root: Path, options: DomainOptions) -> str:
        """What the files are, for cache keys while planning. Raises as :meth:`load`."""
        return self._files(*self._checked(root))

    def import_archive(self, root: Path, archive: Path) -> Path:
        """Take an official archive, or link an unpacked folder, into the data root; the domains may lie deeper in it.

        Raises:
            NotFoundError: ``archive`` does not exist.
            DataError: it is damaged, unsafe, isn't this set, or the set is there already.
            EnvironmentProblem: the disk is full or not writable.
        """
        target = root / self.entry.folder
        if target.exists() or target.is_symlink():
            raise DataError(f"{target} exists already.", "Remove it first to import another copy.")
        if not archive.exists():
            raise NotFoundError(f"{archive} does not exist.", f"Give the path of the {self.entry.name} archive.")
        aside = root / f".{self.entry.folder}.{os.getpid()}.import"
        try:
            root.mkdir(parents=True, exist_ok=True)
            if archive.is_dir():
                target.symlink_to(self._inner(archive, archive).resolve(), target_is_directory=True)
            else:
                aside.mkdir()
                unpack(archive, aside)
                os.replace(self._inner(aside, archive), target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
                raise EnvironmentProblem(
                    f"Cannot take {archive} in below {root}: {os.strerror(error.errno)}.",
                    "Free some space, or choose another data root with MOEPIPE_DATA.",
                ) from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    def miniature(self, root: Path, seed: int) -> None:
        """Write a small generated set in the official layout: every domain, some of the classes, 200-400 JPEGs."""
        entry = self.entry

        def generate(folder: Path, seed: int) -> None:
            _folder_drawings.draw_set(folder, entry.name, entry.domains, self.classes, seed)

        paint.write_set(root / entry.folder, self.info.name, seed, generate)

    def listing(self, root: Path, folder: Path, index: FolderIndex) -> Classes:
        """Domain -> class -> files that count; a set with a list of files to leave out changes it."""
        return index.classes

    def _files(self, folder: Path, index: FolderIndex, listing: Classes) -> str:
        """Sha256 of the files that count and of whether they were generated."""
        counted = None if listing is index.classes else listing
        header = [_FORMAT, self.entry.folder, index.sha256, counted, (folder / _wilds.MARKER).is_file()]
        return hashlib.sha256(json.dumps(header).encode()).hexdigest()

    def _checked(self, root: Path) -> tuple[Path, FolderIndex, Classes]:
        """The set's folder, what is in it and what of that counts, all rules of the layout kept."""
        lacking = self.missing(root)
        if lacking:
            raise NotFoundError(f"{self.info.name}: missing {', '.join(gap.what for gap in lacking)}.", lacking[0].fix)
        folder = self.home(root)
        stray = sorted(set(subfolders(folder)) - set(self.entry.domains))
        if stray:
            raise DataError(
                f"{folder} holds folders that are no domains of {self.entry.name}: {', '.join(stray)}.",
                f"Move them away; its domains are {', '.join(self.entry.domains)}.",
            )
        index = folder_index(folder, self.entry.domains)
        listing = self.listing(root, folder, index)
        _check_classes(folder, listing, self.entry, (folder / _wilds.MARKER).is_file())
        return folder, index, listing

    def _domains_in(self, folder: Path, depth: int = _DEPTH) -> Path | None:
        """The first folder (breadth first) at or below ``folder`` that holds every domain."""
        level = [folder]
        for _ in range(depth + 1):
            for place in level:
                if all((place / name).is_dir() for name in self.entry.domains):
                    return place
            level = [place / name for place in level for name in subfolders(place)]
        return None

    def _inner(self, folder: Path, archive: Path) -> Path:
        found = self._domains_in(folder)
        if found is None:
            raise DataError(
                f"{archive}: is not {self.entry.name}: no folder in it holds {', '.join(self.entry.domains)}.",
                "Give the archive or folder with DomainBed's layout <domain>/<class>/<image>.",
            )
        return found


def _check_classes(folder: Path, listing: Classes, entry: BenchmarkSet, generated: bool) -> None:
    first, *others = listing
    names = list(listing[first])
    for domain in others:
        lost, extra = sorted(set(names) - set(listing[domain])), sorted(set(listing[domain]) - set(names))
        if lost or extra:
            parts = [f"{word} {', '.join(found[:5])}" for word, found in (("lacks", lost), ("adds", extra)) if found]
            raise DataError(
                f"{folder / domain}: its class folders differ from those of {first}: it {' and '.join(parts)}"
                f"{' (and more)' if max(len(lost), len(extra)) > 5 else ''}.",
                "Every domain needs the same class folders; restore them from the official archive.",
            )
    if len(names) != entry.classes and not (generated and 1 < len(names) < entry.classes):
        raise DataError(
            f"{folder}: every domain has {len(names)} class folders, and {entry.name} has {entry.classes} classes.",
            "Restore the folders from the official archive.",
        )
    for domain, classes in listing.items():
        empty = [name for name, files in classes.items() if not files]
        if empty:
            others_too = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise DataError(
                f"{folder / domain / empty[0]}: the class folder has no image{others_too}.",
                "Restore the files from the official archive.",
            )


def _rows(listing: Classes) -> tuple[list[str], IntArray, IntArray]:
    """Paths below the set's folder, labels and domain numbers of all rows."""
    names, labels, domains = [], [], []
    for number, (domain, classes) in enumerate(listing.items()):
        for label, (name, files) in enumerate(classes.items()):
            names += [f"{domain}/{name}/{file}" for file in files]
            labels.append(np.full(len(files), label, np.int64))
            domains.append(np.full(len(files), number, np.int64))
    return names, np.concatenate(labels), np.concatenate(domains)
