"""What an artifact is: files under the digest of a manifest that names them.

An artifact never changes. Its digest is the sha256 of its manifest, and the manifest holds the size and sha256 of every
file, so that equal digests mean equal bytes. The idea is that of git trees and of Metaflow's content-addressed store.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from moe.errors import EnvironmentProblem, RunFailed

FORMAT = 1
MANIFEST = "manifest.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def canonical_json(value: Any) -> bytes:
    """The one way we write JSON that is hashed: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        RunFailed: ``value`` is not plain JSON (numpy numbers, paths, NaN ...).
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunFailed(f"This record is not plain JSON: {error}.", "Use str, int, float, bool, list, dict.") from None
    return text.encode()


def digest_of(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            total.update(piece)
    return total.hexdigest()


def check_name(name: str) -> str:
    """Return ``name`` when it is a relative path that stays inside its folder.

    Raises:
        RunFailed: absolute, empty, with ``..``, backslashes or control characters.
    """
    path = PurePosixPath(name)
    bad = not name or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name
    if bad or any(ord(letter) < 32 for letter in name) or name == MANIFEST:
        raise RunFailed(f"{name!r} is not allowed as a file name in an artifact.", "Use a plain relative path.")
    return name


def check_digest(digest: str) -> str:
    """Return ``digest`` when it is 64 lower-case hex digits (RunFailed otherwise): it becomes a path."""
    if not _DIGEST.fullmatch(digest):
        raise RunFailed(f"{digest!r} is not a digest of this store.", "A digest has 64 hexadecimal digits.")
    return digest


def disk_problem(error: OSError, path: Path | str) -> EnvironmentProblem | None:
    """The error for people when ``error`` says that the disk (or the quota) is full, else None."""
    if error.errno not in _FULL:
        return None
    return EnvironmentProblem(
        f"No space left to write {error.filename or path} ({error.strerror}).",
        "Free some space (`moepipe gc` removes what no run uses) and run `moepipe resume`.",
    )


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hex sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A committed result.

    Attributes:
        digest: sha256 of the manifest.
        kind: what it is (``data``, ``model``, ``metrics``, ...).
        meta: small JSON record written by its stage.
        files: relative POSIX path -> entry.
    """

    digest: str
    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def manifest(self) -> builtins.bytes:
        """The manifest's exact bytes."""
        return manifest_bytes(self.kind, self.meta, self.files)

    @staticmethod
    def parse(digest: str, data: builtins.bytes) -> Artifact:
        """Read a manifest back.

        Raises:
            ValueError: the bytes do not belong to ``digest`` or are of a format that this version cannot read.
        """
        if digest_of(data) != digest:
            raise ValueError("manifest.json does not match its digest")
        record = json.loads(data)
        if record["format"] != FORMAT:
            raise ValueError(f"manifest format {record['format']} is not {FORMAT}")
        files = {check_name(name): FileEntry(**entry) for name, entry in record["files"].items()}
        return Artifact(digest, record["kind"], record["meta"], files)


def manifest_bytes(kind: str, meta: Mapping[str, Any], files: Mapping[str, FileEntry]) -> bytes:
    """Canonical manifest of an artifact; its sha256 is the artifact's digest."""
    entries = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in files.items()}
    return canonical_json({"format": FORMAT, "kind": kind, "meta": dict(meta), "files": entries})


def describe_folder(folder: Path, kind: str, meta: Mapping[str, Any]) -> Artifact:
    """Hash everything below ``folder`` into the artifact that it would become; nothing is written.

    Raises:
        RunFailed: a link or special file is in it, or a name that is not allowed.
    """
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RunFailed(f"{path.name!r} is a link or a special file.", "Artifacts hold regular files only.")
        if path.is_file():
            name = check_name(path.relative_to(folder).as_posix())
            files[name] = FileEntry(path.stat().st_size, file_digest(path))
    # The round trip through JSON makes the record that is returned equal to the one that is read back later.
    manifest = manifest_bytes(kind, meta, files)
    return Artifact.parse(digest_of(manifest), manifest)


def size_problem(artifact: Artifact, sizes: Mapping[str, int]) -> str:
    """In words, how the files found (name -> bytes) differ from the manifest; empty when they do not."""
    for name, entry in artifact.files.items():
        if name not in sizes:
            return f"file {name} is missing"
        missing = entry.size - sizes[name]
        if missing:
            return f"file {name} is {abs(missing)} bytes {'short' if missing > 0 else 'too long'}"
    return ""


def quiet_remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        path.unlink()
