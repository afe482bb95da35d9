"""Take MNIST-like IDX files out of a folder or an archive and place them under the data root.

Files are recognised by name wherever they lie in the archive (raw or gzipped), so no path of the archive is ever used;
each is checked by size and SHA-256 before anything is written.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from moe.errors import DataError, NotFoundError
from workers.datasets._idx import IdxSource, raw_folder
from workers.datasets.base import FileRecord


def import_archive(root: Path, archive: Path, source: IdxSource) -> Path:
    """Place the four files of ``source`` found in ``archive``.

    Args:
        root: data root.
        archive: a folder, a tar file (``.tar``, ``.tar.gz``, ``.tgz``) or a ``.zip``.
        source: which set.

    Returns:
        The folder with the files.

    Raises:
        NotFoundError: ``archive`` does not exist, or a file is not in it.
        DataError: the archive or a file in it is damaged or another edition.
    """
    if not archive.exists():
        raise NotFoundError(f"There is no {archive}.", "Check the path.")
    wanted = {Path(record.path).name: record for record in source.files}
    found: dict[str, bytes] = {}
    try:
        for name, opener in _entries(archive):
            base = name.removesuffix(".gz")
            if base in wanted and base not in found:
                found[base] = _content(opener, name.endswith(".gz"), wanted[base], archive)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{archive} is damaged or not an archive: {error}.", "Fetch it again.") from error
    lost = sorted(wanted.keys() - found.keys())
    if lost:
        raise NotFoundError(f"{archive} does not hold {', '.join(lost)}.", f"Expected the files of: {source.fix(root)}")
    folder = raw_folder(root, source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        partial = folder / f".{name}.{os.getpid()}"
        try:
            partial.write_bytes(content)
            os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
    return folder


def _entries(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Base names of the regular files in a folder or an archive, with a function that opens each."""
    if archive.is_dir():
        for path in sorted(archive.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path.name, lambda path=path: path.open("rb")  # type: ignore[misc]
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            for entry in pack.infolist():
                yield Path(entry.filename).name, lambda entry=entry: pack.open(entry)  # type: ignore[misc]
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile():
                    yield Path(member.name).name, lambda member=member: tar.extractfile(member)  # type: ignore[misc]


def _content(opener: Callable[[], IO[bytes]], zipped: bool, record: FileRecord, archive: Path) -> bytes:
    """A file's bytes, never more than the expected size plus one, checked."""
    with opener() as stream:
        content = (gzip.GzipFile(fileobj=stream) if zipped else stream).read(record.size + 1)
    seen = hashlib.sha256(content).hexdigest()
    if len(content) != record.size or seen != record.sha256:
        raise DataError(
            f"{Path(record.path).name} in {archive} is damaged or another edition: SHA-256 {seen}, "
            f"expected {record.sha256}.",
            "Fetch it again.",
        )
    return content
