"""What a member leaves on its machine, carried to the store while it works (checkpoints, log) and to its successor.

With a store that is not a folder every machine has a scratch folder of its own. A spot machine that goes would take the
checkpoints with it. So they are copied into the store as they are made, and a member that begins elsewhere fetches them
first: at most what came after the last copied checkpoint is computed again. The wish to stop comes the other way.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from moe.errors import MoepipeError
from orchestrator.blobs_remote import RemoteBlobs
from orchestrator.executors.base import Task
from orchestrator.store import Store

EVERY_S = 10.0


class Courier:
    """A context manager around one member; it does nothing for a store that is a folder.

    Args:
        store: the store.
        task: the member's.
        every_s: how often changes are looked for; ``MOEPIPE_SYNC_S`` overrides it.
    """

    def __init__(self, store: Store, task: Task, every_s: float = EVERY_S) -> None:
        self._store, self._key, self._log = store, task.key.digest, Path(task.log)
        self._every_s = float(os.environ.get("MOEPIPE_SYNC_S", every_s))
        self._known: dict[str, tuple[int, int]] = {}
        self._log_mark: tuple[int, int] | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.finished = False

    def __enter__(self) -> Courier:
        if isinstance(self._store.blobs, RemoteBlobs):
            self._fetch(self._store.blobs)
            self._thread = threading.Thread(
                target=self._carry, args=(self._store.blobs,), name="moepipe-courier", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or not isinstance(self._store.blobs, RemoteBlobs):
            return
        self._done.set()
        self._thread.join()
        with suppress(MoepipeError):  # the result is there already; what is missing are words, or a checkpoint
            self._copy_log(self._store.blobs)
            if self.finished:
                if self._known:
                    self._store.blobs.remove(f"scratch/{self._key}")
                if self._stopped:
                    self._store.blobs.remove_file(f"scratch/{self._key}.stop")
            else:
                self._copy_scratch(self._store.blobs)

    def _fetch(self, blobs: RemoteBlobs) -> None:
        """Checkpoints of an earlier attempt, when this machine has none; and the log, to go on writing it."""
        scratch = self._store.scratch(self._key)
        if not any(scratch.iterdir()):
            blobs.get(f"scratch/{self._key}", scratch)
        for path in _files(scratch):
            self._known[path.relative_to(scratch).as_posix()] = _mark(path)
        if not self._log.exists() and self._store.folder in self._log.parents:
            with suppress(FileNotFoundError):
                blobs.download(self._log_place(), self._log)

    def _log_place(self) -> str:
        return self._log.relative_to(self._store.folder).as_posix()

    def _carry(self, blobs: RemoteBlobs) -> None:
        flag = self._store.folder / "scratch" / f"{self._key}.stop"
        while not self._done.wait(self._every_s):
            with suppress(MoepipeError):  # the next round finds the same changes
                if blobs.read(f"scratch/{self._key}.stop") is not None:
                    flag.touch()
                    self._stopped = True
                self._copy_scratch(blobs)
                self._copy_log(blobs)

    def _copy_scratch(self, blobs: RemoteBlobs) -> None:
        scratch = self._store.folder / "scratch" / self._key
        here = {path.relative_to(scratch).as_posix(): path for path in _files(scratch)}
        for name, path in here.items():
            with suppress(FileNotFoundError):  # an old checkpoint that was dropped meanwhile
                mark = _mark(path)
                if self._known.get(name) != mark:
                    blobs.upload(path, f"scratch/{self._key}/{name}")
                    self._known[name] = mark
        for name in set(self._known) - set(here):
            blobs.remove(f"scratch/{self._key}/{name}")
            del self._known[name]

    def _copy_log(self, blobs: RemoteBlobs) -> None:
        if self._log.exists() and self._store.folder in self._log.parents:
            mark = _mark(self._log)
            if self._log_mark != mark:
                blobs.write(self._log_place(), self._log.read_bytes())
                self._log_mark = mark


def _mark(path: Path) -> tuple[int, int]:
    now = path.stat()
    return now.st_size, now.st_mtime_ns


def _files(folder: Path) -> list[Path]:
    """Whole files, oldest first: the file that completes a checkpoint comes after what it completes."""
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        with suppress(FileNotFoundError):
            if not hidden and path.is_file():
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def ask_to_stop(task: Task) -> None:
    """Tell a member that may be on another machine to stop at its next checkpoint (no folder is shared with it)."""
    if "://" in task.store:
        with suppress(MoepipeError):
            _open(task).blobs.write(f"scratch/{task.key.digest}.stop", b"stop")


def forget_stop(task: Task) -> None:
    """Take an earlier wish to stop back."""
    if "://" in task.store:
        _open(task).blobs.remove_file(f"scratch/{task.key.digest}.stop")


@lru_cache(maxsize=8)
def _opened(url: str, cache: str) -> Store:
    return Store.open(url, Path(cache).parent)


def _open(task: Task) -> Store:
    return _opened(task.store, task.cache)
