"""Deltas in memory: least recently used first out, limited in bytes, pinned ones stay.

Keyed by the delta's digest, so that what is found is what was asked for, whoever wrote the files in between. A delta
that is evicted while a request uses it lives on until that request is done: nothing is recycled.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from serve.delta import Delta
from serve.errors import NoRoom


@dataclass(frozen=True)
class ResidentStats:
    """Counters since the start of the process.

    Attributes:
        entries: deltas in memory now.
        bytes: their size; at most ``limit``.
        limit: configured bytes.
        pinned_bytes: part of ``bytes`` that is never evicted.
        hits: requests answered from memory.
        misses: requests that read a file or recomputed.
        evictions: deltas that were dropped for others.
    """

    entries: int
    bytes: int
    limit: int
    pinned_bytes: int
    hits: int
    misses: int
    evictions: int


class Resident:
    """The cache; safe for many threads.

    Args:
        limit: bytes of tensors that may be held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._held: OrderedDict[str, Delta] = OrderedDict()
        self._pinned: set[str] = set()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, digest: str, load: Callable[[], Delta], pinned: bool = False) -> Delta:
        """The delta with this digest; ``load`` is called once however many threads ask at the same time.

        Args:
            digest: of the delta.
            load: reads it when it is not in memory; its errors are passed on and nothing is kept.
            pinned: keep it until :meth:`release`.
        """
        found = self._find(digest, pinned)
        if found is not None:
            return found
        with self._lock:
            gate = self._loading.setdefault(digest, threading.Lock())
        try:
            with gate:
                found = self._find(digest, pinned, again=True)
                if found is None:
                    found = load()
                    with self._lock:
                        self._misses += 1
                        self._hold(digest, found, pinned)
                return found
        finally:
            with self._lock:
                self._loading.pop(digest, None)

    def put(self, digest: str, delta: Delta) -> None:
        """Hold a delta that was made just now, as if it had been read."""
        with self._lock:
            if digest not in self._held:
                self._hold(digest, delta, pinned=False)

    def require_room(self, size: int, digest: str) -> None:
        """Raises NoRoom when ``size`` more pinned bytes would exceed the limit."""
        with self._lock:
            taken = sum(self._held[key].nbytes for key in self._pinned if key != digest)
        if taken + size > self.limit:
            raise NoRoom(
                f"Pinned states would need {taken + size} bytes, and {self.limit} are configured.",
                "Unpin another state, or raise the resident bytes.",
            )

    def release(self, digest: str) -> None:
        """The delta may be evicted again."""
        with self._lock:
            self._pinned.discard(digest)

    def drop(self, digest: str) -> None:
        """Forget it (its state was deleted)."""
        with self._lock:
            self._pinned.discard(digest)
            gone = self._held.pop(digest, None)
            self._bytes -= gone.nbytes if gone is not None else 0

    def evict_all(self, but: Collection[str] = ()) -> None:
        """Forget everything that is not pinned."""
        with self._lock:
            for digest in [key for key in self._held if key not in self._pinned and key not in but]:
                self._evict(digest)

    def stats(self) -> ResidentStats:
        """See :class:`ResidentStats`."""
        with self._lock:
            pinned = sum(self._held[digest].nbytes for digest in self._pinned)
            return ResidentStats(
                len(self._held), self._bytes, self.limit, pinned, self._hits, self._misses, self._evictions
            )

    def _find(self, digest: str, pinned: bool, again: bool = False) -> Delta | None:
        with self._lock:
            found = self._held.get(digest)
            if found is not None:
                self._held.move_to_end(digest)
                self._hits += not again
                if pinned:
                    self._pinned.add(digest)
            return found

    def _hold(self, digest: str, delta: Delta, pinned: bool) -> None:
        """Make room and hold ``delta``; one that does not fit is handed out without being held. Call with the lock."""
        room = self.limit - sum(self._held[key].nbytes for key in self._pinned)
        if delta.nbytes > room:
            return
        for key in [key for key in self._held if key not in self._pinned]:
            if self._bytes + delta.nbytes <= self.limit:
                break
            self._evict(key)
        self._held[digest] = delta
        self._bytes += delta.nbytes
        if pinned:
            self._pinned.add(digest)

    def _evict(self, digest: str) -> None:
        self._bytes -= self._held.pop(digest).nbytes
        self._evictions += 1
