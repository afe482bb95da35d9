"""What the files of a WILDS set are, in one sha256: names and sizes of all images, bytes of the tables. Not the pixels.

Asking the file system for 200,000 sizes takes seconds (minutes on some network drives), so the answer is kept in the
set's folder. It counts only while the tables' bytes and the modification times of all image folders are what they were:
adding, removing or replacing a file changes the latter. Overwriting a file in place doesn't; ``moepipe data verify``
finds that.
No pandas or torch here: planning a run computes this.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.errors import DataError
from workers.datasets._kept_record import keep, read_kept, unchanged

KEPT = ".moepipe_files.json"
_FORMAT = 1


@dataclass(frozen=True)
class FilesRecord:
    """What is kept.

    Attributes:
        format: of this record.
        tables: sha256 of the tables.
        folders: image folders below the set's folder with their modification times in ns.
        sha256: of everything.
        complete: every image that the tables list was seen to be there.
    """

    format: int
    tables: str
    folders: dict[str, int]
    sha256: str
    complete: bool


def files_digest(folder: Path, tables: Sequence[str], images: str, listed: Sequence[str] | None = None) -> str:
    """The sha256.

    Args:
        folder: of the set.
        tables: its CSV files.
        images: its image folder.
        listed: paths of the images that the tables list; None when they were not read (planning).

    Raises:
        DataError: a listed image is not there.
    """
    known = read_kept(folder / KEPT, FilesRecord, _FORMAT)
    sha = _tables_digest(folder, tables)
    valid = known is not None and known.tables == sha and unchanged(folder, known.folders)
    if known is not None and valid and (known.complete or listed is None):
        return known.sha256
    if known is not None and valid:
        present = {name for name, _ in _walk(folder, images, {}, sizes=False)}
        found = known.sha256
    else:
        folders: dict[str, int] = {}
        total = hashlib.sha256(f"{_FORMAT} {sha}\n".encode())
        present = set()
        for name, size in _walk(folder, images, folders):
            present.add(name)
            total.update(f"{name}\0{size}\n".encode())
        found = total.hexdigest()
        known = FilesRecord(_FORMAT, sha, folders, found, False)
    if listed is not None:
        _require(folder, tables[0], listed, present)
    keep(folder / KEPT, FilesRecord(_FORMAT, sha, known.folders, found, listed is not None))
    return found


def _require(folder: Path, table: str, listed: Sequence[str], present: set[str]) -> None:
    lost = [name for name in listed if name not in present]
    if lost:
        others = f", as are {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise DataError(
            f"{folder / lost[0]}: image is missing{others} of the {len(listed):,} that {table} lists.",
            "Restore the files from the official archive.",
        )


def _tables_digest(folder: Path, tables: Sequence[str]) -> str:
    sha = hashlib.sha256()
    for table in tables:
        sha.update(f"{table}\n".encode())
        with (folder / table).open("rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _walk(folder: Path, below: str, folders: dict[str, int], sizes: bool = True) -> Iterator[tuple[str, int]]:
    """All files below ``folder/below`` as (path below ``folder``, size), in a fixed order; fills ``folders``."""
    # The time is read before the listing: a file that arrives in between makes the record stale, not wrong.
    folders[below] = os.stat(folder / below).st_mtime_ns
    with os.scandir(folder / below) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = f"{below}/{entry.name}"
        if entry.is_dir():
            yield from _walk(folder, name, folders, sizes)
        else:
            yield name, (entry.stat().st_size if sizes else 0)
