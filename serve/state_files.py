"""The files of the states: one small file that changes and folders that never do.

Layout::

    <folder>/<tenant>/<name>/head.json     current version, pinned versions, next version: the only file that changes
    <folder>/<tenant>/<name>/<version>/    record.json and delta.safetensors or support.safetensors: never change
    <folder>/.aside/                       where new versions are written before they are renamed into place
    <folder>/.locks/                       writers of one state take turns; readers never wait

``head.json`` is replaced in one step, so a reader sees the old state or the new one, and a crash leaves the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from moe.errors import BusyError, CheckpointError, EnvironmentProblem, NotFoundError
from orchestrator.artifacts import disk_problem
from orchestrator.blobs import write_atomic
from serve.errors import NoRoom
from serve.records import StateRecord, check_state_name, no_such_state
from workers.modelfile import load_tensors, save_tensors

_ASIDE, _LOCKS = ".aside", ".locks"
_LOCK_S = 10.0
_STRIPES = 256
_REMEMBERED = 4096
_OLD_S = 3600.0
_RACY_NS = 50_000_000


@dataclass(frozen=True)
class Head:
    """``head.json``. ``current`` is None for a name whose state was deleted; its versions are never used again."""

    current: int | None
    next: int
    pinned: tuple[int, ...] = ()

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({"current": self.current, "next": self.next, "pinned": list(self.pinned)}).encode()

    @staticmethod
    def parse(data: bytes) -> Head:
        """Inverse of :meth:`dump`; raises ValueError, KeyError, TypeError."""
        value: dict[str, Any] = json.loads(data)
        return Head(value["current"], int(value["next"]), tuple(value["pinned"]))


class StateFiles:
    """Reads and writes below one folder; safe for many threads and processes.

    Args:
        folder: made when it does not exist.

    Raises:
        EnvironmentProblem: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._memory = threading.Lock()
        self._heads: OrderedDict[Path, tuple[tuple[int, int, int], Head]] = OrderedDict()
        self._records: OrderedDict[Path, StateRecord] = OrderedDict()
        with disk_errors(folder):
            for part in (_ASIDE, _LOCKS):
                (folder / part).mkdir(parents=True, exist_ok=True)
        self._sweep()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def place(self, tenant: str, name: str) -> Path:
        """The state's folder. Raises SpecError for names that are not allowed."""
        return self.folder / check_state_name(tenant, "tenant") / check_state_name(name)

    def places(self, tenant: str) -> list[Path]:
        """Folders of all names that the tenant ever used, sorted."""
        with suppress(FileNotFoundError):
            return sorted(
                path for path in (self.folder / check_state_name(tenant, "tenant")).iterdir() if path.is_dir()
            )
        return []

    def tenants(self) -> list[str]:
        """All tenants with a folder."""
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def live(self, place: Path) -> bool:
        """Whether the state exists (its name may remain after a deletion)."""
        head = self.head(place)
        return head is not None and head.current is not None

    def head(self, place: Path) -> Head | None:
        """``head.json``, parsed again only when the file was replaced; None when there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = place / "head.json"
        try:
            seen = path.stat()
            mark = (seen.st_mtime_ns, seen.st_ino, seen.st_size)
            with self._memory:
                known = self._heads.get(place)
                if known is not None and known[0] == mark:
                    self._heads.move_to_end(place)
                    return known[1]
            head = Head.parse(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.", "Restore it, or remove its folder.") from None
        # A file that is younger than the clock's tick may be replaced without a visible change (git: racily clean).
        if time.time_ns() - seen.st_mtime_ns > _RACY_NS:
            with self._memory:
                self._heads[place] = (mark, head)
                _limit(self._heads)
        return head

    def record(self, place: Path, head: Head, version: int) -> StateRecord:
        """The record of a version.

        Raises:
            NotFoundError: it is not there (any more).
            CheckpointError: it cannot be read.
        """
        folder = place / str(version)
        with self._memory:
            record = self._records.get(folder)
        if record is None or not folder.is_dir():
            try:
                record = StateRecord.from_json(json.loads((folder / "record.json").read_bytes()))
            except (FileNotFoundError, NotADirectoryError):
                raise no_such_state(place.name, version) from None
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{folder / 'record.json'} cannot be read: {error}.", "Adapt again.") from None
            with self._memory:
                self._records[folder] = record
                _limit(self._records)
        return replace(record, pinned=version in head.pinned, current=version == head.current)

    def content(self, record: StateRecord) -> bytes:
        """The bytes of a version's file; raises as :meth:`record`."""
        try:
            return (self.place(record.tenant, record.name) / str(record.version) / _file(record)).read_bytes()
        except FileNotFoundError:
            raise no_such_state(record.name, record.version) from None

    def tensors(self, record: StateRecord) -> dict[str, Tensor]:
        """The tensors of a version's file; raises as :meth:`record`."""
        place = self.place(record.tenant, record.name)
        try:
            return load_tensors(place / str(record.version) / _file(record))
        except NotFoundError:
            raise no_such_state(record.name, record.version) from None

    @staticmethod
    def versions(place: Path) -> set[int]:
        """Versions that are on disk."""
        with suppress(FileNotFoundError):
            return {int(path.name) for path in place.iterdir() if path.name.isdigit()}
        return set()

    # ---- writing ---------------------------------------------------------------------------------------------------

    def add(self, record: StateRecord, tensors: Mapping[str, Tensor]) -> StateRecord:
        """Write a new version and make it the current one; hold :meth:`lock`.

        Raises:
            EnvironmentProblem: the disk is full; nothing is changed.
        """
        place = self.place(record.tenant, record.name)
        aside = self.folder / _ASIDE / uuid.uuid4().hex
        try:
            with disk_errors(aside):
                aside.mkdir()
                save_tensors(aside / _file(record), tensors)
                head = self.head(place) or Head(None, 1)
                size = (aside / _file(record)).stat().st_size
                record = replace(record, version=head.next, stored_bytes=size)
                data = json.dumps(record.to_json(), allow_nan=False).encode()
                record = StateRecord.from_json(json.loads(data))  # what is handed out is what will be read
                write_atomic(aside / "record.json", data)
                place.mkdir(parents=True, exist_ok=True)
                # A crash between the two lines leaves a version that no head names; the next one takes its place.
                self.discard(place, head.next)
                os.rename(aside, place / str(head.next))
                self.write_head(place, replace(head, current=head.next, next=head.next + 1))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return record

    def write_head(self, place: Path, head: Head) -> None:
        """Replace ``head.json`` in one step; hold :meth:`lock`."""
        with disk_errors(place):
            write_atomic(place / "head.json", head.dump())
        with self._memory:
            self._heads.pop(place, None)

    def discard(self, place: Path, version: int) -> None:
        """Remove a version: out of sight in one step, then file by file."""
        gone = self.folder / _ASIDE / uuid.uuid4().hex
        with suppress(FileNotFoundError):
            os.rename(place / str(version), gone)
        shutil.rmtree(gone, ignore_errors=True)
        with self._memory:
            self._records.pop(place / str(version), None)

    def make_room(self, place: Path, limit: int) -> None:
        """See that the tenant may have one more name.

        Raises:
            NoRoom: it has ``limit`` states.
        """
        if self.live(place):
            return
        names = self.places(place.parent.name)
        if len(names) < limit:
            return
        if sum(1 for path in names if self.live(path)) >= limit:
            raise NoRoom(f"There are {limit} states already.", "Delete states that are not needed any more.")
        for path in names:  # names that were deleted and remain only so that their version numbers go on
            with self.lock(path):
                if not self.live(path):
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def lock(self, place: Path) -> Iterator[None]:
        """Be the only writer of a state. Raises BusyError after ten seconds."""
        stripe = int(hashlib.sha256(f"{place.parent.name}/{place.name}".encode()).hexdigest()[:8], 16) % _STRIPES
        try:
            with FileLock(str(self.folder / _LOCKS / str(stripe)), timeout=_LOCK_S):
                yield
        except Timeout:
            raise BusyError(f"State {place.name!r} is being changed by another process.", "Try again.") from None

    def _sweep(self) -> None:
        """Remove what crashed writers left aside."""
        for path in (self.folder / _ASIDE).iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _OLD_S:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell an OSError as an EnvironmentProblem."""
    try:
        yield
    except OSError as error:
        raise disk_problem(error, path) or EnvironmentProblem(
            f"{error.filename or path} cannot be written: {error.strerror or error}.", "Check the folder of the states."
        ) from error


def _file(record: StateRecord) -> str:
    return "delta.safetensors" if record.kind == "delta" else "support.safetensors"


def _limit(cache: OrderedDict[Path, Any]) -> None:
    while len(cache) > _REMEMBERED:
        cache.popitem(last=False)
