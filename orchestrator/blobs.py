"""Where the store's bytes lie: a local folder, or anything that fsspec can reach.

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
from typing import Any, Protocol

from moe.errors import EnvironmentProblem
from orchestrator.artifacts import MANIFEST, disk_problem


class Blobs(Protocol):
    """Files by POSIX path relative to the store's root."""

    def read(self, path: str) -> bytes | None:
        """The bytes, or None when there is no such file."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a small file so that readers see the old or the new bytes, never a part."""
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


@contextmanager
def _plain_errors(path: Path | str) -> Iterator[None]:
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
        with _plain_errors(path):
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
        with _plain_errors(target):
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
        with _plain_errors(target):
            shutil.copytree(self.root / folder, target, dirs_exist_ok=True)

    def names(self, folder: str) -> list[str]:
        """See :class:`Blobs`."""
        try:
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        """See :class:`Blobs`."""
        target = self.root / path
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)


class RemoteBlobs:
    """Any fsspec file system: ``memory://``, ``s3://``, ``gs://``, ..."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self.fs = filesystem
        self.root = root.rstrip("/")

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes | None:
        """See :class:`Blobs`."""
        try:
            return bytes(self.fs.cat_file(self._full(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """See :class:`Blobs`. Object stores make a single upload visible at once."""
        with _plain_errors(path):
            self.fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(self._full(path), data)

    def sizes(self, folder: str) -> dict[str, int]:
        """See :class:`Blobs`."""
        base = self._full(folder)
        found = self.fs.find(base, detail=True)
        start = len(self.fs._strip_protocol(base)) + 1
        return {name[start:]: int(info["size"]) for name, info in found.items()}

    def put(self, source: Path, folder: str) -> None:
        """See :class:`Blobs`. The manifest goes last."""
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        files.sort(key=lambda path: path.name == MANIFEST and path.parent == source)
        with _plain_errors(folder):
            for path in files:
                target = f"{self._full(folder)}/{path.relative_to(source).as_posix()}"
                self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(path), target)
        shutil.rmtree(source, ignore_errors=True)

    def get(self, folder: str, target: Path) -> None:
        """See :class:`Blobs`."""
        for name in self.sizes(folder):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with _plain_errors(path):
                self.fs.get_file(f"{self._full(folder)}/{name}", str(path))

    def names(self, folder: str) -> list[str]:
        """See :class:`Blobs`."""
        try:
            found = self.fs.ls(self._full(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def remove(self, path: str) -> None:
        """See :class:`Blobs`."""
        with suppress(FileNotFoundError):
            self.fs.rm(self._full(path), recursive=True)
