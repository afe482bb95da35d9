"""Claims in an object store: who is making what, when the workers share nothing but ``s3://`` or ``gs://``.

A claim is a small object that is written only if it is not there (a conditional write), with the name of its holder.
The holder keeps one object of its own fresh, its beat; a claim whose holder's beat has been silent for a minute is void
and may be taken over. Times are those of the store's clock.

What an object store cannot give: a lock. A holder that is cut off and comes back after its claim was taken over goes on
for at most one beat, and a server that ignores conditional writes lets two holders believe in themselves. Both cost
double work and nothing else: results are content-addressed, written aside and published by one object.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from moe.errors import MoepipeError
from orchestrator.artifacts import canonical_json
from orchestrator.blobs import Blobs

BEAT_S = 10.0
SILENT_S = 60.0
_SETTLE_S = 0.5


class Claims:
    """The claims of one process in one store.

    Args:
        blobs: of the store.
        beat_s: how often the beat is renewed.
        silent_s: after how long a silent holder's claims are void.
    """

    def __init__(self, blobs: Blobs, beat_s: float = BEAT_S, silent_s: float = SILENT_S) -> None:
        self._blobs = blobs
        self._beat_s, self._silent_s = beat_s, silent_s
        self.holder = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._held: set[str] = set()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._beaten = -beat_s

    def take(self, name: str) -> bool:
        """Claim ``name`` for this process; False when another live process has it.

        Raises:
            EnvironmentProblem: the store does not answer.
        """
        self._begin()
        mine = canonical_json({"holder": self.holder})
        if not self._blobs.create(_place(name), mine):
            holder = self.holder_of(name)
            if holder is not None and self._alive(holder):
                return False
            # Whoever writes last among those who saw the void claim has it.
            self._blobs.write(_place(name), mine)
            time.sleep(_SETTLE_S)
            if self.holder_of(name) != self.holder:
                return False
        with self._guard:
            self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give a claim back; one that was taken over is left to its new holder."""
        with self._guard:
            self._held.discard(name)
        with suppress(MoepipeError):  # it becomes void by itself
            if self.holder_of(name) == self.holder:
                self._blobs.remove_file(_place(name))

    def holder_of(self, name: str) -> str | None:
        """Who has a claim."""
        data = self._blobs.read(_place(name))
        try:
            return str(json.loads(data)["holder"]) if data is not None else None
        except (ValueError, KeyError, TypeError):
            return None

    def sweep(self) -> None:
        """Remove the claims and beats of holders that are gone."""
        beats = self._blobs.names("claims/holders")
        gone = {name.removesuffix(".json") for name in beats if not self._alive(name.removesuffix(".json"))}
        for name in self._blobs.names("claims"):
            holder = self.holder_of(name.removesuffix(".json")) if name.endswith(".json") else None
            if holder in gone:
                self._blobs.remove_file(f"claims/{name}")
        for holder in gone:
            self._blobs.remove_file(_beat(holder))

    def _alive(self, holder: str) -> bool:
        machine, pid = _whose(holder)
        if machine == _machine() and not _runs(pid):
            return False  # a driver that was killed here; nobody has to wait for its silence
        self._beat_now()  # so that the store's clock is known
        last = self._blobs.modified(_beat(holder))
        now = self._blobs.modified(_beat(self.holder))
        return last is not None and now is not None and now - last < self._silent_s

    def _begin(self) -> None:
        """Beat before the first claim, and go on in a thread as long as something is held."""
        if time.monotonic() - self._beaten > self._beat_s / 2:
            self._beat_now()
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat_on, name="moepipe-claims", daemon=True)
                self._thread.start()

    def _beat_on(self) -> None:
        while True:
            time.sleep(self._beat_s)
            if self._held:
                with suppress(MoepipeError):
                    self._beat_now()

    def _beat_now(self) -> None:
        self._blobs.write(_beat(self.holder), b"{}")
        self._beaten = time.monotonic()


def _machine() -> str:
    """This machine since it was booted: names are not unique, and containers of one machine have their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}-{boot.read_text()[:8] if boot.exists() else 'x'}"


def _whose(holder: str) -> tuple[str, int]:
    """Machine and process of a holder's name."""
    machine, _, rest = holder.rpartition("-")[0].rpartition("-")
    return machine, int(rest) if rest.isdigit() else 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _place(name: str) -> str:
    return f"claims/{name}.json"


def _beat(holder: str) -> str:
    return f"claims/holders/{holder}.json"


class Releases(Protocol):
    """What can be given back."""

    def release(self) -> None:
        """Give it back."""
        ...


class Claim:
    """A claim beside a lock file of this machine; ``release()`` gives both back."""

    def __init__(self, claims: Claims, name: str, lock: Releases) -> None:
        self._claims, self._name, self._lock = claims, name, lock

    def release(self) -> None:
        """Give it back."""
        self._claims.release(self._name)
        self._lock.release()
