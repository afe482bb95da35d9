"""Where the store's bytes lie: a local folder here, or anything that fsspec can reach (``blobs_remote``).

The two differ in how a folder becomes visible at once. A local folder is renamed into place. An object store has no
rename, so the manifest is uploaded last and a folder without one does not exist for readers.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from moe.errors import EnvironmentProblem
from orchestrator.artifacts import disk_problem


class Blobs(Protocol):
    """Files by POSIX path relative to the store's root."""

    def read(self, path: str) -> bytes | None:
        """The bytes, or None when there is no such file."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a small file so that readers see the old or the new bytes, never a part."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file that must not exist yet; False, and nothing written, when it does."""
        ...

    def modified(self, path: str) -> float | None:
        """When a file was written, in seconds since 1970 by the clock of where it lies; None when it is not there."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Files below ``folder`` with their sizes in bytes, by relative path."""
        ...

    def put(self, source: Path, folder: str) -> None:
        """Make the content of the local folder ``source`` visible as ``folder`` at once; ``source`` is consumed."""
        ...

    def get(self, folder: str, target: Path) -> None:
        """Copy ``folder`` into the local folder ``target``."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names directly in ``folder``, sorted; empty when it does not exist."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file or a folder; nothing happens when it is gone."""
        ...

    def remove_file(self, path: str) -> None:
        """Remove a file; nothing happens when it is gone."""
        ...


@contextmanager
def plain_errors(path: Path | str) -> Iterator[None]:
    """A full disk and missing rights become errors for people."""
    try:
        yield
    except OSError as error:
        problem = disk_problem(error, path)
        if problem is None and isinstance(error, PermissionError):
            problem = EnvironmentProblem(f"No permission to write {error.filename or path}.", "Choose another --store.")
        if problem is None:
            raise
        raise problem from None


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename it into place.

    Raises:
        EnvironmentProblem: the disk is full or not writable; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(data)
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class LocalBlobs:
    """A folder of this machine (or of a shared file system)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes | None:
        """See :class:`Blobs`."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        """See :class:`Blobs`."""
        write_atomic(self.root / path, data)

    def create(self, path: str, data: bytes) -> bool:
        """See :class:`Blobs`."""
        target = self.root / path
        with plain_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with target.open("xb") as stream:
                    stream.write(data)
            except FileExistsError:
                return False
        return True

    def modified(self, path: str) -> float | None:
        """See :class:`Blobs`."""
        try:
            return (self.root / path).stat().st_mtime
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        """See :class:`Blobs`."""
        base = self.root / folder
        found: dict[str, int] = {}
        for where, _, files in os.walk(base):
            for name in files:
                path = Path(where, name)
                with suppress(FileNotFoundError):
                    found[path.relative_to(base).as_posix()] = path.stat().st_size
        return found

    def put(self, source: Path, folder: str) -> None:
        """See :class:`Blobs`. A folder that is there already is the damaged one and is replaced."""
        target = self.root / folder
        with plain_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(source, target)
            except OSError:
                if not target.exists():
                    raise
                # Two renames: between them the artifact is missing, which readers count as a miss.
                aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
                os.rename(target, aside)
                os.rename(source, target)
                shutil.rmtree(aside, ignore_errors=True)

    def get(self, folder: str, target: Path) -> None:
        """See :class:`Blobs`."""
        with plain_errors(target):
            shutil.copytree(self.root / folder, target, dirs_exist_ok=True)

    def names(self, folder: str) -> list[str]:
        """See :class:`Blobs`."""
        try:
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def remove_file(self, path: str) -> None:
        """See :class:`Blobs`."""
        (self.root / path).unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """See :class:`Blobs`."""
        target = self.root / path
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
