"""What was found out about a folder of files, kept in the folder itself as one JSON file.

A record is a dataclass with ``format`` and ``folders`` (folder -> modification time in ns). It counts only while these
times are what they were.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


def unchanged(folder: Path, folders: dict[str, int]) -> bool:
    """Whether the folders below ``folder`` have these modification times."""
    try:
        return all(os.stat(folder / name).st_mtime_ns == time for name, time in folders.items())
    except OSError:
        return False


def read_kept(path: Path, kind: type[R], version: int) -> R | None:
    """What was kept, if it can be read; absent or damaged means that it is found out anew."""
    try:
        record: Any = json.loads(path.read_text())
        known: Any = kind(**record)
    except (OSError, ValueError, TypeError):
        return None
    return known if known.format == version and isinstance(known.folders, dict) else None


def keep(path: Path, record: DataclassInstance) -> None:
    """Atomically write ``record``; a data root that is read-only or full only costs the next start some seconds."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(asdict(record)))
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
