"""A store on anything that fsspec can reach: S3 and what speaks like it, Google Cloud Storage, memory (tests), ..."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from moe.errors import EnvironmentProblem, MoepipeError
from orchestrator.artifacts import MANIFEST
from orchestrator.blobs import plain_errors

T = TypeVar("T")
_PATIENCE_S = 60.0
_FLAT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_PASSING = {None, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


class RemoteBlobs:
    """Any fsspec file system: ``memory://``, ``s3://``, ``gs://``, ...

    A server that does not answer for a while is asked again (every operation here may be done twice); one that goes on
    being silent, a missing bucket and missing rights are errors that name the store.

    Args:
        filesystem: fsspec's.
        root: path of the store in it.
        url: of the store, for messages.
    """

    def __init__(self, filesystem: Any, root: str, url: str = "") -> None:
        self.fs = filesystem
        self.root = root.rstrip("/")
        self.url = url or root
        protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
        self._folders = not _FLAT & set(protocols)

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _make_parent(self, full: str) -> None:
        """Object stores have no folders; asking them for one may make a bucket of a misspelt name."""
        if self._folders:
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)

    def _ask(self, operation: Callable[[], T]) -> T:
        """Do it; again with growing pauses while the server is out of reach."""
        give_up = time.monotonic() + float(os.environ.get("MOEPIPE_STORE_PATIENCE_S", _PATIENCE_S))
        pause = 0.25
        while True:
            try:
                return operation()
            except Exception as error:
                if not passing(error):
                    raise
                if time.monotonic() + pause > give_up:
                    raise EnvironmentProblem(
                        f"The store {self.url} does not answer: {type(error).__name__}: {str(error)[:200]}.",
                        "Look at the address, the network and the credentials; `moepipe resume` goes on.",
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _change(self, operation: Callable[[], T]) -> T:
        """Like :meth:`_ask`, for writing: a missing bucket and missing rights become errors for people."""
        try:
            with plain_errors(self.url):
                return self._ask(operation)
        except FileNotFoundError as error:
            raise EnvironmentProblem(
                f"The store {self.url} cannot be written: {error}.",
                "Make its bucket first: object stores have no folders to make on the way.",
            ) from None

    def read(self, path: str) -> bytes | None:
        """See :class:`orchestrator.blobs.Blobs`."""
        try:
            return bytes(self._ask(lambda: self.fs.cat_file(self._full(path))))
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """See :class:`orchestrator.blobs.Blobs`. Object stores make a single upload visible at once."""

        def operation() -> None:
            self._make_parent(self._full(path))
            self.fs.pipe_file(self._full(path), data)

        self._change(operation)

    def create(self, path: str, data: bytes) -> bool:
        """See :class:`orchestrator.blobs.Blobs`. Atomic where the server knows conditional writes."""

        def operation() -> bool:
            self._make_parent(self._full(path))
            try:
                self.fs.pipe_file(self._full(path), data, mode="create")
            except FileExistsError:
                # A repeated request may meet what it wrote itself.
                return bool(self.fs.cat_file(self._full(path)) == data)
            return True

        return self._change(operation)

    def modified(self, path: str) -> float | None:
        """See :class:`orchestrator.blobs.Blobs`."""
        try:
            return float(self._ask(lambda: self.fs.modified(self._full(path))).timestamp())
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        """See :class:`orchestrator.blobs.Blobs`."""
        base = self._full(folder)
        found = self._ask(lambda: self.fs.find(base, detail=True))
        start = len(self.fs._strip_protocol(base)) + 1
        return {name[start:]: int(info["size"]) for name, info in found.items()}

    def put(self, source: Path, folder: str) -> None:
        """See :class:`orchestrator.blobs.Blobs`. The manifest goes last."""
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        files.sort(key=lambda path: path.name == MANIFEST and path.parent == source)
        for path in files:
            self.upload(path, f"{folder}/{path.relative_to(source).as_posix()}")
        shutil.rmtree(source, ignore_errors=True)

    def upload(self, source: Path, path: str) -> None:
        """Copy one local file to ``path``."""

        def operation() -> None:
            self._make_parent(self._full(path))
            self.fs.put_file(str(source), self._full(path))

        self._change(operation)

    def download(self, path: str, target: Path) -> None:
        """Copy one file to the local ``target``, which is there whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with plain_errors(target):
                self._ask(lambda: self.fs.get_file(self._full(path), str(aside)))
                os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def get(self, folder: str, target: Path) -> None:
        """See :class:`orchestrator.blobs.Blobs`."""
        for name in self.sizes(folder):
            self.download(f"{folder}/{name}", target / name)

    def names(self, folder: str) -> list[str]:
        """See :class:`orchestrator.blobs.Blobs`."""
        try:
            found = self._ask(lambda: self.fs.ls(self._full(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def remove_file(self, path: str) -> None:
        """Like :meth:`remove`, for what is a file: one request and no listing."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self.fs.rm_file(self._full(path)))

    def remove(self, path: str) -> None:
        """See :class:`orchestrator.blobs.Blobs`."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self.fs.rm(self._full(path), recursive=True))


def passing(error: Exception) -> bool:
    """Whether an error of a remote file system may be gone in a moment: no answer, a broken connection, overload."""
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError | IsADirectoryError
    ):
        return False
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in _PASSING
    known = isinstance(error, ValueError | TypeError | AttributeError | KeyError | NotImplementedError | MoepipeError)
    return not known and not any(word in type(error).__name__ for word in ("Credentials", "Validation", "Login"))
