"""Run records in an object store: written on one machine, read on all, there when the machines are gone.

The driver works on files of its own disk (a record is appended, which object stores cannot) and copies what changed
every few seconds to ``runs/<id>/`` of the store. Everybody else reads copies of those. A new driver (the head was lost)
fetches the record, takes the run's claim and goes on writing where it ends.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from moe.errors import BusyError, MoepipeError
from orchestrator.blobs_remote import RemoteBlobs
from orchestrator.events import Event
from orchestrator.owner import alive
from orchestrator.runs import Run, Status, read_json
from orchestrator.store import Store

PUSH_S = 5.0
PULL_S = 2.0
_BYTES_PER_S = 200_000  # a record that grows large is copied less often
_BEAT_S = 15.0
_COPY = "copy"  # marks a record whose writer is elsewhere
_NOT_COPIED = ("lock", "cancel", _COPY)


class StoredRun(Run):
    """A run of a store that is not a folder. Reading refreshes the copy; :meth:`lock` makes this machine its writer."""

    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(path)
        self._store = store
        self._blobs = cast(RemoteBlobs, store.blobs)
        self._place = f"runs/{self.id}"
        self._pulled = 0.0
        self._writing = False
        self._logs: set[str] = set()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def refresh(self, now: bool = False) -> None:
        """Fetch what is newer in the store; nothing when this process writes the record, or did so a moment ago."""
        if self._writing or (not now and time.monotonic() - self._pulled < PULL_S) or self._is_written_here():
            return
        self._pulled = time.monotonic()
        sizes = self._blobs.sizes(self._place)
        for name in list(sizes) + (["owner.json"] if "owner.json" not in sizes else []):
            here = self.path / name
            if name not in sizes:
                here.unlink(missing_ok=True)
            elif name.startswith("logs/") and name not in self._logs:
                continue  # members' logs are fetched when they are asked for
            elif name == "owner.json" or not here.exists() or here.stat().st_size < sizes[name]:
                with suppress(FileNotFoundError):
                    self._blobs.download(f"{self._place}/{name}", here)
                    if name == "owner.json":
                        (self.path / _COPY).touch()
                        beat = self._blobs.modified(f"{self._place}/{name}") or 0.0
                        os.utime(here, (beat, beat))
        self._ended = None

    def _is_written_here(self) -> bool:
        """Whether a process of this machine writes the record: then the files here are the newest."""
        if (self.path / _COPY).exists():
            return False
        owner = read_json(self.path / "owner.json") or {}
        return owner.get("host") == socket.gethostname() and alive(owner, 0.0)

    @property
    def status(self) -> Status:
        """See :class:`orchestrator.runs.Run`."""
        if self._end() is None:
            self.refresh()
        return super().status

    def follow(self, start: int = 0) -> Iterator[tuple[Event, int]]:
        """See :class:`orchestrator.runs.Run`."""
        if self._end() is None:
            self.refresh()
        return super().follow(start)

    def log_path(self, node: str) -> Path:
        """See :class:`orchestrator.runs.Run`; the file is fetched when it is not here."""
        path = super().log_path(node)
        name = path.relative_to(self.path).as_posix()
        if name not in self._logs:
            self._logs.add(name)
            self.refresh(now=True)
        return path

    def request_stop(self) -> None:
        """See :class:`orchestrator.runs.Run`."""
        super().request_stop()
        self._blobs.write(f"{self._place}/cancel", b"")

    # ---- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See :class:`orchestrator.runs.Run`; no other machine may be writing the run either.

        Raises:
            BusyError: another live process does.
        """
        self.refresh(now=True)
        claims = self._store.claims()
        if not claims.take(f"run-{self.id}"):
            raise BusyError(
                f"Run {self.id} is being worked on by {claims.holder_of(f'run-{self.id}') or 'another process'}.",
                f"Follow it with `moepipe status {self.id}`, or stop it with `moepipe cancel {self.id}`.",
            )
        try:
            with super().lock():
                self._writing = True
                (self.path / _COPY).unlink(missing_ok=True)
                self._blobs.remove_file(f"{self._place}/cancel")  # an old wish to stop is void
                copier = _Copier(self, self._store)
                copier.copy()
                copier.start()
                try:
                    yield
                finally:
                    copier.done.set()
                    copier.join()
            if not copier.ousted:
                with suppress(MoepipeError):
                    copier.copy()
        finally:
            self._writing = False
            claims.release(f"run-{self.id}")


class _Copier(threading.Thread):
    """Copies a record into the store while it is written; looks for the wish to stop meanwhile."""

    def __init__(self, run: StoredRun, store: Store) -> None:
        super().__init__(name="moepipe-record", daemon=True)
        self._run, self._blobs, self._place = run, store.blobs, f"runs/{run.id}"
        self._claims = store.claims()
        self._known: dict[str, tuple[int, int]] = {}
        self._beat = 0.0
        self.done = threading.Event()
        self.ousted = False

    def run(self) -> None:
        """Thread body."""
        pause = PUSH_S
        while not self.done.wait(pause):
            with suppress(MoepipeError):  # the store is away: the next round finds the same changes
                if self._claims.holder_of(f"run-{self._run.id}") not in (self._claims.holder, None):
                    (self._run.path / "cancel").touch()  # another machine took over: it thought us dead
                    self.ousted = True
                    return
                pause = max(PUSH_S, self.copy() / _BYTES_PER_S)
                if self._blobs.read(f"{self._place}/cancel") is not None:
                    self._blobs.remove_file(f"{self._place}/cancel")
                    (self._run.path / "cancel").touch()

    def copy(self) -> int:
        """One round; returns the bytes written."""
        written = 0
        # The events last: who sees the end of a run finds the rest of it there.
        for path in sorted(self._run.path.rglob("*"), key=lambda path: (path.name == "events.jsonl", path)):
            name = path.relative_to(self._run.path).as_posix()
            if not path.is_file() or path.name.startswith(".") or name in _NOT_COPIED:
                continue
            with suppress(FileNotFoundError):
                now = path.stat()
                beat = name == "owner.json" and time.monotonic() - self._beat > _BEAT_S
                if beat or (name != "owner.json" and self._known.get(name) != (now.st_size, now.st_mtime_ns)):
                    data = path.read_bytes()
                    self._blobs.write(f"{self._place}/{name}", data)
                    self._known[name] = (now.st_size, now.st_mtime_ns)
                    written += len(data)
                    if beat:
                        self._beat = time.monotonic()
        if self._beat and not (self._run.path / "owner.json").exists():
            self._blobs.remove_file(f"{self._place}/owner.json")
            self._beat = 0.0
        return written


def pull_index(store: Store, root: Path) -> None:
    """Make a folder with ``run.json`` and ``spec.json`` for every run of the store that is not here yet."""
    blobs = cast(RemoteBlobs, store.blobs)
    for name in blobs.names("runs"):
        folder = root / name
        if not (folder / "run.json").exists():
            for file in ("spec.json", "environment.json", "run.json"):
                with suppress(FileNotFoundError):
                    blobs.download(f"runs/{name}/{file}", folder / file)
