"""Decoded images in one memory-mapped file per data set and node: decoded once, shared through the page cache.

A file of pixels is ``<name>.bin`` (all images, uint8, one after the other) with ``<name>.npy`` (int64 ``[N, 4]``:
offset, height, width, channels). Whoever comes first writes it under a lock while others wait; the table is put in
place last, so that it stands for a whole file. A set that would need more than the limit, or more than the disk has
left, is not written, and its images are decoded each time.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from moe.errors import DataError
from workers.datasets._arrays import toolchain
from workers.datasets.base import DomainData, Images
from workers.domainbed.augment import Pixels, mapped, resized

LIMIT = 32 * 2**30  # bytes
_SAMPLE = 64  # images decoded to estimate the size of all
_BLOCK = 256  # images in memory while writing
_SPARE = 1.1  # the estimate may be this much too low
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_FORMAT = 1


class PixelFile:
    """Images of a file of pixels; opened when first read, in every process by itself.

    Args:
        path: the ``.bin`` file.

    Raises:
        DataError: on reading, when file and table do not fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table: NDArray[np.int64] | None = None
        self._pixels: Any = None

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        """Image ``row``, uint8 ``[H, W, C]``: a read-only view."""
        offset, *shape = (int(value) for value in self._open()[row])
        size = shape[0] * shape[1] * shape[2]
        image: NDArray[np.generic] = self._pixels[offset : offset + size].reshape(shape)
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_table": None, "_pixels": None}  # a pickled map would carry all pixels

    def _open(self) -> NDArray[np.int64]:
        if self._table is None:
            hint = f"Delete it and it is made again: rm '{self.path}' '{_table_of(self.path)}'"
            try:
                table: NDArray[np.int64] = np.load(_table_of(self.path), allow_pickle=False)
                self._pixels = np.memmap(self.path, dtype=np.uint8, mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"The decoded images {self.path} cannot be read ({error}).", hint) from error
            expected = int(table[-1, 0] + table[-1, 1:].prod()) if table.ndim == 2 and len(table) else -1
            if len(self._pixels) != expected:
                raise DataError(
                    f"The decoded images {self.path} have {len(self._pixels):,} bytes, expected {expected:,}.", hint
                )
            self._table = table
        return self._table


@dataclass(frozen=True)
class ResizedImages:
    """Another set of images at ``size x size``, resized on every access."""

    images: Images
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        return resized(np.asarray(self.images[row], dtype=np.uint8), self.size)


def original_images(data: DomainData, folder: Path, limit: int = LIMIT, threads: int = 1) -> Images:
    """The images as they are stored, from a file of pixels where there may be one, else as ``data`` gives them.

    Args:
        data: the set; its digest names the file.
        folder: of this node, for files of pixels.
        limit: most bytes of one file.
        threads: images decoded at a time while writing.

    Raises:
        DataError: an image is corrupt, or the file of pixels is damaged.
    """
    images = data.images
    rows = np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(np.int64))
    path = _path(data, folder, "originals")
    made = _table_of(path).exists()
    estimate = 0 if made else int(np.mean([np.asarray(images[int(row)]).nbytes for row in rows]) * len(images))
    return _pixel_file(path, images, estimate, limit, threads)


def resized_images(data: DomainData, images: Images, size: int, folder: Path, limit: int, threads: int = 1) -> Images:
    """``images`` (of ``data``) at ``size x size``; arguments and errors as of :func:`original_images`."""
    small = ResizedImages(images, size)
    estimate = len(images) * size * size * data.info.channels
    return _pixel_file(_path(data, folder, f"resized-{size}"), small, estimate, limit, threads)


def _path(data: DomainData, folder: Path, name: str) -> Path:
    # Decoders differ in the last bit between versions of Pillow.
    return folder / f"{data.info.name}-{data.digest[:24]}" / f"{name}-v{_FORMAT}-{toolchain('pillow')}.bin"


def _table_of(path: Path) -> Path:
    return path.with_suffix(".npy")


def _pixel_file(path: Path, images: Images, estimate: int, limit: int, threads: int) -> Images:
    if _table_of(path).exists():
        return PixelFile(path)
    try:
        if estimate > limit:
            return images
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not _table_of(path).exists():
                if estimate * _SPARE > _free(path.parent):
                    return images
                _write(path, images, threads)
    except OSError as error:
        if error.errno in _REFUSED:
            return images
        raise
    return PixelFile(path)


def _write(path: Path, images: Images, threads: int) -> None:
    """Write pixels, then table. The lock is held, so what an interrupted process left behind may go."""
    for leftover in path.parent.glob(f".{path.stem}.*.part"):
        leftover.unlink(missing_ok=True)
    table = np.zeros((len(images), 4), np.int64)

    def pixels(stream: IO[bytes]) -> None:
        offset = 0
        for row, image in enumerate(_in_blocks(images, threads)):
            table[row] = (offset, *image.shape)
            offset += stream.write(np.ascontiguousarray(image).data)

    _put(path, pixels)
    buffer = io.BytesIO()
    np.save(buffer, table)
    _put(_table_of(path), lambda stream: stream.write(buffer.getvalue()))


def _in_blocks(images: Images, threads: int) -> Iterator[Pixels]:
    for start in range(0, len(images), _BLOCK):
        rows = range(start, min(start + _BLOCK, len(images)))
        yield from mapped(lambda row: np.asarray(images[row], dtype=np.uint8), rows, threads)


def _put(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file aside and move it to ``path``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
