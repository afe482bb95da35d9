"""Which images lie in a set of class folders, in the official order, with one sha256 over their names and sizes.

Order as torchvision's ``ImageFolder``: classes sorted, in a class the sub-folders sorted, in these the file names.
Walking half a million files takes seconds, so the answer is kept in the set's folder. It counts only while the
modification times of all domain and class folders are what they were: adding, removing or replacing a file changes
them. Overwriting a file in place doesn't; ``moepipe data verify`` finds that. No torch here: planning computes this.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.datasets._kept_record import keep, read_kept, unchanged

KEPT = ".moepipe_index.json"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_FORMAT = 1


@dataclass(frozen=True)
class FolderIndex:
    """What is there.

    Attributes:
        format: of this record.
        folders: every folder below the set's, with its modification time in ns.
        classes: domain -> class -> paths of its images below the class folder, with forward slashes.
        sha256: of all names and sizes.
    """

    format: int
    folders: dict[str, int]
    classes: dict[str, dict[str, list[str]]]
    sha256: str


def folder_index(folder: Path, domains: Sequence[str]) -> FolderIndex:
    """The images of ``folder/<domain>/<class>/``; all domain folders must exist. Hidden folders are left out."""
    known = read_kept(folder / KEPT, FolderIndex, _FORMAT)
    if known is not None and list(known.classes) == list(domains) and unchanged(folder, known.folders):
        return known
    folders: dict[str, int] = {}
    digest = hashlib.sha256(f"{_FORMAT}\n".encode())
    classes = {domain: _domain(folder, domain, folders, digest) for domain in domains}
    found = FolderIndex(_FORMAT, folders, classes, digest.hexdigest())
    keep(folder / KEPT, found)
    return found


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _domain(folder: Path, domain: str, folders: dict[str, int], digest: Any) -> dict[str, list[str]]:
    # The time is read before the listing: a file that arrives in between makes the record stale, not wrong.
    folders[domain] = os.stat(folder / domain).st_mtime_ns
    return {name: _class(folder, f"{domain}/{name}", folders, digest) for name in subfolders(folder / domain)}


def _class(folder: Path, below: str, folders: dict[str, int], digest: Any) -> list[str]:
    top = folder / below
    found = []
    for place, _, names in sorted(os.walk(top, followlinks=True)):
        inner = Path(place).relative_to(top).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        folders[f"{below}/{prefix}".rstrip("/")] = os.stat(place).st_mtime_ns
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS):
                found.append(prefix + name)
                digest.update(f"{below}/{prefix}{name}\0{os.stat(os.path.join(place, name)).st_size}\n".encode())
    return found
