"""Helpers of the embedded sets: in-memory images, content digests, a checked cache, and packages found without import.

An embedded set is small (tens of megabytes) and rendered from what installed packages carry. The rendered arrays are
cached under the data root, named by recipe; a cache file carries the SHA-256 of its own contents and a mismatch is an
error, never a silent rebuild.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from workers.datasets.base import DatasetInfo, DomainData, IntArray

Arrays = dict[str, NDArray[Any]]
_CHECK = "sha256"


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory: uint8 ``[N, H, W, C]``."""

    array: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        """Image ``row``, uint8 ``[H, W, C]`` (a view)."""
        image: NDArray[np.uint8] = self.array[row]
        return image


def package_folder(name: str, extra: str, root: Path | None = None) -> Path:
    """Folder of an installed package, found without importing (and so without running) it.

    Args:
        name: import name of the package.
        extra: pip extra of this project that brings it, or a pip command when there is none.
        root: data root; ``<root>/packages/<name>`` (an unpacked wheel) is looked at first.

    Raises:
        NotFoundError: neither there nor installed; the hint is the command that installs it.
    """
    if root is not None and (root / "packages" / name).is_dir():
        return root / "packages" / name
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        raise NotFoundError(f"The package {name!r} is not installed.", install_hint(extra))
    return Path(locations[0])


def has_package(name: str, root: Path | None = None) -> bool:
    """Whether :func:`package_folder` would find it."""
    return (root is not None and (root / "packages" / name).is_dir()) or importlib.util.find_spec(name) is not None


def install_hint(extra: str) -> str:
    """The command that brings an optional package."""
    return extra if " " in extra else f"Install it with: pip install 'moepipe[{extra}]'"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_arrays(arrays: Mapping[str, NDArray[Any]], **facts: Any) -> str:
    """SHA-256 over names, types, shapes and bytes of ``arrays`` and over JSON-like ``facts``."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def cached(folder: Path, recipe: str, build: Callable[[], Arrays]) -> Arrays:
    """Arrays of ``<folder>/<recipe>.npz``, built and written (atomically) when they are not there.

    Args:
        folder: where the set's prepared copies live; when it cannot be written to, nothing is cached.
        recipe: file stem; must name everything that decides the contents.
        build: makes the arrays.

    Raises:
        DataError: the cached file is damaged.
        EnvironmentProblem: the disk is full or the folder refuses the file.
    """
    path = folder / f"{recipe}.npz"
    if path.exists():
        return read_checked(path)
    arrays = build()
    if not _writable(folder):
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_checked(path, arrays)
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot write the prepared data set {path}: {error.strerror or error}.",
            "Free some space, or point MOEPIPE_DATA at another folder.",
        ) from error
    return arrays


def write_checked(path: Path, arrays: Arrays) -> None:
    """Write an ``.npz`` that carries the digest of its arrays; readers see the whole file or none."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            contents: dict[str, Any] = {**arrays, _CHECK: np.array(digest_arrays(arrays))}
            np.savez(stream, **contents)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_checked(path: Path) -> Arrays:
    """Arrays of a file made by :func:`write_checked`.

    Raises:
        DataError: truncated, not an archive, or its contents do not match the digest in it.
    """
    hint = f"Delete it and it is built again: rm '{path}'"
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        expected = str(arrays.pop(_CHECK))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"The prepared data set {path} is damaged ({error}).", hint) from error
    if digest_arrays(arrays) != expected:
        raise DataError(f"The prepared data set {path} does not match the checksum inside it.", hint)
    return arrays


def toolchain(*distributions: str) -> str:
    """Short tag of the versions that draw pixels, e.g. the tag of Pillow 12 and matplotlib 3.10.

    Glyph and photo pixels may differ in the last bit between versions, so the tag is part of a cache file's name.
    """
    from importlib.metadata import version

    return hashlib.sha256(",".join(f"{name}={version(name)}" for name in distributions).encode()).hexdigest()[:8]


def domain_data(
    info: DatasetInfo,
    images: NDArray[np.uint8],
    labels: IntArray,
    metadata: IntArray,
    fields: tuple[str, ...],
    splits: Mapping[str, IntArray],
    value_names: Mapping[str, tuple[str, ...]],
) -> DomainData:
    """Assemble a :class:`DomainData` with ascending splits and its content digest."""
    splits = {name: np.sort(rows).astype(np.int64) for name, rows in splits.items()}
    arrays: Arrays = {f"split/{name}": rows for name, rows in splits.items()}
    arrays |= {"images": images, "labels": labels, "metadata": metadata}
    names = {key: list(values) for key, values in value_names.items()}
    digest = digest_arrays(arrays, name=info.name, fields=list(fields), value_names=names)
    return DomainData(info, ArrayImages(images), labels, metadata, fields, splits, digest, value_names)


def held_out(rows: IntArray, fraction: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Split ``rows`` at random into (rest, held out), the second ``round(fraction * n)`` long."""
    order = rng.permutation(rows)
    count = round(len(rows) * fraction)
    return order[count:], order[:count]


def _writable(folder: Path) -> bool:
    """Whether ``folder`` (or the nearest parent that exists) accepts new files."""
    while not folder.exists():
        if folder.parent == folder:
            return False
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
