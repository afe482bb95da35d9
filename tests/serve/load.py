"""An open-loop load generator: requests leave when their time has come, whatever became of those before.

A process of its own (``python -m tests.serve.load``), so that it does not slow down who asks it: a plan as JSON on
stdin, one line per request on stdout. Latency counts from the moment a request was due, so a server that falls behind
cannot hide it (coordinated omission). Where the generator itself was held up by the machine, requests that it could not
send in time are left out: all at once they would be another load.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LATE = 0.1  # seconds after which a request is left out
BROKEN = 0  # in place of a status: the connection was refused, reset, or closed before the answer


@dataclass(frozen=True)
class Shot:
    """One request: its kind, when it was due and sent (seconds from the start), how long the answer took."""

    kind: str
    due: float
    sent: float
    seconds: float
    status: int
    retry_after: int


@dataclass
class Outcome:
    """All requests of one load."""

    shots: list[Shot]

    def of(self, kind: str) -> Outcome:
        return Outcome([shot for shot in self.shots if shot.kind == kind])

    @property
    def accepted(self) -> list[Shot]:
        return [shot for shot in self.shots if shot.status == 200]

    @property
    def statuses(self) -> dict[int, int]:
        return dict(sorted(Counter(shot.status for shot in self.shots).items()))

    def quantile(self, share: float) -> float:
        """Seconds of the accepted requests."""
        return float(np.quantile([shot.seconds for shot in self.accepted], share))

    def late(self, share: float = 0.99) -> float:
        """Seconds by which the generator itself was late."""
        return float(np.quantile([shot.sent - shot.due for shot in self.shots], share))


def message(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP/1.1 request; ``_`` in names of headers stands for ``-``."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def drive(
    port: int,
    folder: Path,
    kinds: Mapping[str, Sequence[bytes]],
    rates: Mapping[str, float],
    seconds: float,
    clients: int = 0,
    seed: int = 0,
) -> Outcome:
    """Load the server at ``port``, in another process.

    Args:
        port: of loopback.
        folder: for the requests' bytes.
        kinds: kind -> its requests, sent in turns.
        rates: kind -> arrivals a second (Poisson); ignored with ``clients``.
        seconds: how long.
        clients: instead of open-loop, so many clients that wait for each answer: what a server can do at most.
        seed: of the arrivals.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}
    for kind, bodies in kinds.items():
        for number, body in enumerate(bodies):
            path = folder / f"{kind}-{number}"
            path.write_bytes(body)
            files.setdefault(kind, []).append(str(path))
    plan = {"port": port, "files": files, "rates": rates, "seconds": seconds, "clients": clients, "seed": seed}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.load"],
        input=json.dumps(plan),
        text=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
        timeout=seconds + 240,
    )
    return Outcome([Shot(**json.loads(line)) for line in done.stdout.splitlines()])


# ---- the process ----------------------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, int]] | None = None
        self.received = b""
        self.closed = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._end(BROKEN, -1)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.split(b"\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
        if len(body) < int(fields.get(b"content-length", 0)):
            return
        self.received = b""
        self.closed = self.closed or fields.get(b"connection") == b"close"
        self._end(int(lines[0].split()[1]), int(fields.get(b"retry-after", -1)))

    def _end(self, status: int, retry_after: int) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((status, retry_after))

    def ask(self, raw: bytes) -> asyncio.Future[tuple[int, int]]:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(raw)
        return self.answer


class _Load:
    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self.raw = {kind: [Path(file).read_bytes() for file in files] for kind, files in plan["files"].items()}
        self.idle: list[_Connection] = []
        self.shots: list[Shot] = []
        self.begin = 0.0

    async def one(self, kind: str, number: int, due: float) -> None:
        sent = time.perf_counter() - self.begin
        try:
            connection = await self._connection()
            status, retry_after = await asyncio.wait_for(
                connection.ask(self.raw[kind][number % len(self.raw[kind])]), 200
            )
        except OSError:
            status, retry_after = BROKEN, -1
        else:
            if not connection.closed:
                self.idle.append(connection)
        taken = time.perf_counter() - self.begin - due
        self.shots.append(Shot(kind, due, sent, taken, status, retry_after))

    async def _connection(self) -> _Connection:
        while self.idle:
            found = self.idle.pop()
            if not found.closed:
                return found
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, "127.0.0.1", self.plan["port"])
        return made

    async def open_loop(self) -> None:
        rng, tasks, due = random.Random(self.plan["seed"]), set(), []
        for kind, rate in self.plan["rates"].items():
            at, number = rng.expovariate(rate), 0
            while at < self.plan["seconds"]:
                due.append((at, kind, number))
                at, number = at + rng.expovariate(rate), number + 1
        self.begin = time.perf_counter()
        for at, kind, number in sorted(due):
            if (left := at - (time.perf_counter() - self.begin)) > 0:
                await asyncio.sleep(left)
            elif left < -LATE:
                continue
            tasks.add(asyncio.create_task(self.one(kind, number, at)))
            if number % 50 == 0:
                await asyncio.sleep(0)  # also when behind: answers have to be read
        await asyncio.gather(*tasks)

    async def closed_loop(self) -> None:
        self.begin = time.perf_counter()

        async def client(first: int) -> None:
            number = first
            while (now := time.perf_counter() - self.begin) < self.plan["seconds"]:
                kind = sorted(self.raw)[number % len(self.raw)]
                await self.one(kind, number, now)
                number += 1

        await asyncio.gather(*(client(number) for number in range(self.plan["clients"])))


def main() -> None:
    load = _Load(json.load(sys.stdin))
    asyncio.run(load.closed_loop() if load.plan["clients"] else load.open_loop())
    for shot in load.shots:
        print(json.dumps(asdict(shot)))


if __name__ == "__main__":
    main()
