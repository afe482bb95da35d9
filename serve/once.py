"""Idempotency: a request that is sent twice under one key is carried out once, also across processes and crashes.

One small file per tenant and key lies beside the states. It is written when the work begins (a claim), and again with
the report when it ended; both writes replace the file in one step. Who finds a claim without a report knows that an
earlier attempt died and may have published already.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe.errors import SpecError
from orchestrator.blobs import write_atomic
from serve.http.problems import Refused

_KEEP_S = 86400.0
_MAX_KEY = 256


class Claim:
    """The right to carry out a request.

    Attributes:
        report: what came out before, or None when nothing did.
        since: when the first attempt began, seconds since 1970; None when this is the first.
        noted: what an attempt that died had noted, see :meth:`note`.
    """

    def __init__(self, path: Path, fingerprint: str, known: Mapping[str, Any]) -> None:
        self._path, self._fingerprint = path, fingerprint
        self.report: Mapping[str, Any] | None = known.get("report")
        self.since: float | None = known.get("since")
        self.noted: Mapping[str, Any] = known.get("noted", {})
        if self.since is None:
            self._write({"fingerprint": fingerprint, "since": time.time()})

    def note(self, **facts: Any) -> None:
        """Remember for the next attempt, should this one die, how things stood before it published anything."""
        self._write({"fingerprint": self._fingerprint, "since": self.since or time.time(), "noted": facts})

    def finish(self, report: Mapping[str, Any]) -> None:
        """Remember the outcome."""
        self._write({"fingerprint": self._fingerprint, "since": self.since or time.time(), "report": report})

    def _write(self, value: Mapping[str, Any]) -> None:
        write_atomic(self._path, json.dumps(value).encode())


class Once:
    """Keys of all tenants.

    Args:
        folder: where the files go; made when needed.
        wait_seconds: how long a second request waits for the first.
    """

    def __init__(self, folder: Path, wait_seconds: float = 300.0) -> None:
        self._folder, self._wait = folder, wait_seconds
        self._folder.mkdir(parents=True, exist_ok=True)
        limit = time.time() - _KEEP_S
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    path.unlink()

    @contextmanager
    def claim(self, tenant: str, key: str, fingerprint: str) -> Iterator[Claim]:
        """Hold the key while the request is carried out.

        Args:
            tenant: owner of the key.
            key: chosen by the client.
            fingerprint: digest of the request; another one under the same key is a conflict.

        Raises:
            SpecError: the key is empty or longer than 256 characters.
            Refused: 409, the key belongs to another request, or the first attempt is not over yet.
        """
        check_key(key)
        path = self._folder / (hashlib.sha256(f"{tenant}\n{key}".encode()).hexdigest() + ".json")
        try:
            with FileLock(str(path.with_suffix(".lock")), timeout=self._wait):
                yield Claim(path, fingerprint, self._known(path, fingerprint))
        except Timeout:
            raise Refused(
                409, "in-progress", "The first request with this Idempotency-Key is not over.", "Ask again later.", 5
            ) from None

    def _known(self, path: Path, fingerprint: str) -> Mapping[str, Any]:
        try:
            known: dict[str, Any] = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        if known.get("fingerprint") != fingerprint:
            raise Refused(
                409, "idempotency-conflict", "This Idempotency-Key was used for another request.", "Use a new key."
            )
        return known


def check_key(key: str) -> str:
    """``key`` when it can be one. Raises SpecError when it is empty or longer than 256 characters."""
    if not key or len(key) > _MAX_KEY or not key.isprintable():
        raise SpecError("The Idempotency-Key is empty, too long or not printable.", "Use 1 to 256 characters.")
    return key
