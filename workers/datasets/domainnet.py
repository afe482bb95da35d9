"""DomainNet: 345 classes in six styles; one style unseen.

586,575 images without duplicates, 345 classes. The official archives hold 9,431 files more, which DomainBed leaves out:
their list is read from ``domainnet_duplicates.txt`` in the data root (or the set's folder), one path below the set's
folder a line. Reference: Peng et al. 2019, Moment Matching for Multi-Source Domain Adaptation.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from pydantic import Field

from moe.errors import DataError
from workers.datasets._domain_splits import DomainOptions
from workers.datasets._folder_index import FolderIndex
from workers.datasets._image_folders import Classes, FolderSet, folder_info
from workers.datasets.base import Missing
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]

INFO = folder_info(
    "domainnet",
    "DomainNet",
    "DomainNet: 345 classes in six styles; one style unseen",
    "fair use for research, see the authors' page",
    "Peng et al. 2019, Moment Matching for Multi-Source Domain Adaptation",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("sketch", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


DUPLICATES = ("domainnet_duplicates.txt", "domain_net_duplicates.txt")  # ours, and as DomainBed names it
_WITHOUT = 586_575  # images once the duplicates are gone


class _DomainNet(FolderSet):
    """Leaves the listed duplicates out."""

    def listing(self, root: Path, folder: Path, index: FolderIndex) -> Classes:
        """All files but those of the list; a warning when there is no list and the duplicates are there."""
        path = _list_of(root, folder)
        if path is None:
            count = sum(len(files) for classes in index.classes.values() for files in classes.values())
            if count > _WITHOUT:
                warnings.warn(
                    f"domainnet: {count:,} images, {count - _WITHOUT:,} more than without duplicates, and no list of "
                    f"them; put DomainBed's list at {root / DUPLICATES[0]}.",
                    stacklevel=2,
                )
            return index.classes
        dropped = _read(path, set(self.entry.domains))
        return {
            domain: {
                name: [file for file in files if f"{domain}/{name}/{file}" not in dropped]
                for name, files in classes.items()
            }
            for domain, classes in index.classes.items()
        }


def _list_of(root: Path, folder: Path) -> Path | None:
    places = (place / name for place in (root, folder) for name in DUPLICATES)
    return next((path for path in places if path.is_file()), None)


def _read(path: Path, domains: set[str]) -> frozenset[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if line.split("/")[0] not in domains or line.count("/") < 2:
            raise DataError(
                f"{path}: entry {number} is {line[:80]!r}, not a path <domain>/<class>/<image>.",
                "Use the list that comes with DomainBed's public code.",
            )
    return frozenset(lines)


SET = _DomainNet(INFO, benchmark_set("DomainNet"), ("airplane", "ambulance", "angel", "apple", "axe", "banana"))


def optional(root: Path) -> list[Missing]:
    """The list of duplicates, when the set is there without it."""
    folder = SET.home(root)
    if not folder.is_dir() or _list_of(root, folder) is not None:
        return []
    fix = f"Copy domainbed/misc/domain_net_duplicates.txt of DomainBed's public code to {root / DUPLICATES[0]}."
    return [Missing("the list of 9,431 duplicates (not needed where they were deleted)", fix)]


load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
