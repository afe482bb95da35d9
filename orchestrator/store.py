"""The artifact store: content-addressed results, and the record of which key made which result.

Layout below the store's URL::

    artifacts/<digest>/manifest.json + files     immutable, verified on every lookup
    keys/<key>.json                              key -> digest, key parts, node, seconds
    scratch/<key>/  locks/  staging/  runs/      always on a local (or shared) file system

For a store that is not a folder (``s3://``, ``memory://``) the last line and a read cache lie in a local folder, by
default below the user's cache folder; ``MOEPIPE_CACHE`` overrides it and should name a shared folder on a cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from moe.errors import EnvironmentProblem, NotFoundError
from orchestrator.artifacts import (
    FORMAT,
    MANIFEST,
    Artifact,
    canonical_json,
    check_digest,
    describe_folder,
    file_digest,
    size_problem,
)
from orchestrator.blobs import Blobs, LocalBlobs, write_atomic

if TYPE_CHECKING:
    from orchestrator.cluster_claims import Claims, Releases

DEFAULT_URL = "./.moepipe"


@dataclass(frozen=True)
class Key:
    """The identity of a piece of work before it is done.

    Attributes:
        digest: sha256 over the parts.
        parts: everything that decides the result, by name, so that a miss can be explained.
    """

    digest: str
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyRecord:
    """What is remembered about a finished member.

    Attributes:
        key: digest of its key.
        artifact: digest of what it made.
        parts: the parts of the key.
        node: id of the node that made it first or last, e.g. ``experts/seed=0/group=2``.
        seconds: time its run took.
        bytes: size of the artifact.
    """

    key: str
    artifact: str
    parts: Mapping[str, str]
    node: str = ""
    seconds: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Lookup:
    """Answer of :meth:`Store.examine`: the artifact, or in words why there is none."""

    artifact: Artifact | None
    reason: str = ""


class Store:
    """Artifacts by digest and by key. One per process; cheap to open; safe for many processes at once."""

    def __init__(self, url: str, blobs: Blobs, folder: Path, local: bool) -> None:
        self.url = url
        self.blobs = blobs
        self.folder = folder
        self.is_local = local
        self._claims: Claims | None = None

    @staticmethod
    def open(url: str | Path = DEFAULT_URL, cache: Path | None = None) -> Store:
        """Open (and create when needed) the store at a folder or an fsspec URL.

        Args:
            url: folder, or any URL that fsspec understands.
            cache: local folder of a remote store; default ``MOEPIPE_CACHE`` or the user's cache folder.

        Raises:
            EnvironmentProblem: the URL's protocol is unknown, or the folder cannot be made.
        """
        text = str(url)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if "://" not in text:
            folder = Path(text).expanduser().resolve()
            _make_folder(folder)
            return Store(str(folder), LocalBlobs(folder), folder, local=True)
        import fsspec

        from orchestrator.blobs_remote import RemoteBlobs

        try:
            # No listings cache: other machines write to the same store.
            filesystem, root = fsspec.core.url_to_fs(text, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise EnvironmentProblem(
                f"The store {text} cannot be opened: {error}.", "Install its fsspec driver."
            ) from None
        base = cache or Path(os.environ.get("MOEPIPE_CACHE") or Path("~/.cache/moepipe").expanduser())
        folder = base.resolve() / hashlib.sha256(text.encode()).hexdigest()[:16]
        _make_folder(folder)
        return Store(text, RemoteBlobs(filesystem, root, text), folder, local=False)

    # ---- looking up ------------------------------------------------------------------------------------------------

    def lookup(self, key: Key | str) -> Artifact | None:
        """The artifact that ``key`` made, when all of its files are there with their sizes; else None."""
        return self.examine(key).artifact

    def examine(self, key: Key | str) -> Lookup:
        """Like :meth:`lookup`, with the reason of a miss in words."""
        record = self.record(key)
        if record is None:
            return Lookup(None, "")
        try:
            artifact = self.artifact(record.artifact)
        except NotFoundError as error:
            return Lookup(None, f"its result is damaged: {error.message}")
        problem = size_problem(artifact, self.blobs.sizes(f"artifacts/{artifact.digest}"))
        return Lookup(None, f"its result is damaged: {problem}") if problem else Lookup(artifact)

    def record(self, key: Key | str) -> KeyRecord | None:
        """What is remembered under ``key``, whether or not its artifact still exists."""
        digest = check_digest(key if isinstance(key, str) else key.digest)
        data = self.blobs.read(f"keys/{digest}.json")
        if data is None:
            return None
        with suppress(ValueError, TypeError, KeyError):
            value: dict[str, Any] = json.loads(data)
            if value.pop("format") == FORMAT:
                return KeyRecord(key=digest, **value)
        return None

    def records(self) -> Iterator[KeyRecord]:
        """All key records, in no particular order of age."""
        for name in self.blobs.names("keys"):
            if name.endswith(".json") and (record := self.record(name.removesuffix(".json"))):
                yield record

    def artifact(self, digest: str) -> Artifact:
        """Read an artifact's manifest.

        Raises:
            NotFoundError: there is no manifest, or it does not belong to ``digest``.
        """
        data = self.blobs.read(f"artifacts/{check_digest(digest)}/{MANIFEST}")
        if data is None:
            raise NotFoundError(f"artifact {digest[:12]} is gone", "Run the pipeline again to rebuild it.")
        try:
            return Artifact.parse(digest, data)
        except (ValueError, KeyError, TypeError) as error:
            raise NotFoundError(f"artifact {digest[:12]} is unreadable: {error}", "Run the pipeline again.") from None

    def digests(self) -> list[str]:
        """Digests of all artifacts, sorted."""
        return self.blobs.names("artifacts")

    def verify(self, artifact: Artifact) -> list[str]:
        """Hash every file again; each problem in words, empty when the bytes are what they were."""
        folder = f"artifacts/{artifact.digest}"
        problem = size_problem(artifact, self.blobs.sizes(folder))
        if problem:
            return [problem]
        here = self.local_path(artifact)
        wrong = [name for name, entry in artifact.files.items() if file_digest(here / name) != entry.sha256]
        return [f"file {name} has other bytes than when it was written" for name in wrong]

    def local_path(self, artifact: Artifact) -> Path:
        """Folder with the artifact's files, read-only by convention; a remote artifact is downloaded once.

        Raises:
            NotFoundError: a download did not give the bytes of the manifest.
        """
        if self.is_local:
            return self.folder / "artifacts" / artifact.digest
        target = self.folder / "downloads" / artifact.digest
        if target.is_dir():
            return target
        aside = self.staging()
        try:
            self.blobs.get(f"artifacts/{artifact.digest}", aside)
            for name, entry in artifact.files.items():
                if not (aside / name).is_file() or file_digest(aside / name) != entry.sha256:
                    raise NotFoundError(f"{name} of artifact {artifact.digest[:12]} is damaged in {self.url}.")
            LocalBlobs(self.folder).put(aside, f"downloads/{artifact.digest}")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    # ---- writing ---------------------------------------------------------------------------------------------------

    def commit(
        self,
        folder: Path,
        kind: str,
        meta: Mapping[str, Any],
        key: Key | None = None,
        node: str = "",
        seconds: float = 0.0,
    ) -> Artifact:
        """Turn a folder into an artifact and remember it under ``key``. The folder is consumed.

        A crash at any point leaves either the whole artifact or none; committing what exists already writes nothing.

        Raises:
            RunFailed: links, bad names or a ``meta`` that is not JSON.
            EnvironmentProblem: the disk is full; nothing is left behind.
        """
        artifact = describe_folder(folder, kind, meta)
        place = f"artifacts/{artifact.digest}"
        if not self._intact(artifact):
            write_atomic(folder / MANIFEST, artifact.manifest())
            if folder.stat().st_dev != self.folder.stat().st_dev and self.is_local:
                moved = self.staging()  # a rename does not cross file systems
                shutil.copytree(folder, moved, dirs_exist_ok=True)
                shutil.rmtree(folder)
                folder = moved
            self.blobs.put(folder, place)
        shutil.rmtree(folder, ignore_errors=True)
        if key is not None:
            self.remember(KeyRecord(key.digest, artifact.digest, dict(key.parts), node, seconds, artifact.bytes))
        return artifact

    def _intact(self, artifact: Artifact) -> bool:
        """Whether exactly this artifact is there. Local bytes are hashed, so that a rebuild heals silent damage."""
        place = f"artifacts/{artifact.digest}"
        if self.blobs.read(f"{place}/{MANIFEST}") != artifact.manifest():
            return False
        return not (self.verify(artifact) if self.is_local else size_problem(artifact, self.blobs.sizes(place)))

    def remember(self, record: KeyRecord) -> None:
        """Write the record of a key (the old or the new one is seen, never a part)."""
        value = {name: part for name, part in asdict(record).items() if name != "key"}
        self.blobs.write(f"keys/{check_digest(record.key)}.json", canonical_json({"format": FORMAT, **value}))

    def forget(self, key: str) -> None:
        """Remove a key's record; its artifact stays until nobody refers to it (``moepipe gc``)."""
        self.blobs.remove(f"keys/{check_digest(key)}.json")

    def remove(self, digest: str) -> None:
        """Remove an artifact. The manifest goes first, so that a crash leaves a miss and not a damaged hit."""
        place = f"artifacts/{check_digest(digest)}"
        self.blobs.remove(f"{place}/{MANIFEST}")
        self.blobs.remove(place)
        if not self.is_local:
            shutil.rmtree(self.folder / "downloads" / digest, ignore_errors=True)

    # ---- local working space ---------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """A new empty folder on the store's own file system."""
        folder = self.folder / "staging" / uuid.uuid4().hex
        _make_folder(folder)
        return folder

    def scratch(self, key: Key | str) -> Path:
        """The folder that survives crashes of the member with this key; made when it is not there."""
        folder = self.folder / "scratch" / check_digest(key if isinstance(key, str) else key.digest)
        _make_folder(folder)
        return folder

    def drop_scratch(self, key: Key | str) -> None:
        """Remove the scratch folder and what lies beside it (stop flag, Ray Train's storage)."""
        digest = check_digest(key if isinstance(key, str) else key.digest)
        for suffix in ("", ".train"):
            with suppress(FileNotFoundError):
                shutil.rmtree(self.folder / "scratch" / f"{digest}{suffix}")
        (self.folder / "scratch" / f"{digest}.stop").unlink(missing_ok=True)

    def claims(self) -> Claims:
        """This process's claims, for stores that are not folders."""
        if self._claims is None:
            from orchestrator.cluster_claims import Claims

            self._claims = Claims(self.blobs)
        return self._claims

    def try_lock(self, key: Key | str, role: str = "flight") -> Releases | None:
        """Take the lock of ``key`` when nobody holds it, else None. ``release()`` it; it also ends with the process.

        In a store that is not a folder ``flight`` holds among machines too (:mod:`orchestrator.cluster_claims`).
        """
        digest = check_digest(key if isinstance(key, str) else key.digest)
        _make_folder(self.folder / "locks")
        lock = FileLock(str(self.folder / "locks" / f"{digest}.{role}"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        if self.is_local or role != "flight":
            return lock
        from orchestrator.cluster_claims import Claim

        if not self.claims().take(digest):
            lock.release()
            return None
        return Claim(self.claims(), digest, lock)

    @contextmanager
    def lock(self, key: Key | str, role: str = "flight") -> Iterator[None]:
        """Wait for the lock of ``key`` and hold it."""
        digest = check_digest(key if isinstance(key, str) else key.digest)
        _make_folder(self.folder / "locks")
        with FileLock(str(self.folder / "locks" / f"{digest}.{role}")):
            yield


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"The folder {folder} cannot be made: {error.strerror}.", "Choose another one."
        ) from None
