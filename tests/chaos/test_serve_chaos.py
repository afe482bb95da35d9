"""kill -9 of every part of a running ``moepipe serve`` while clients adapt, follow streams and predict.

What was acknowledged stays: every state with the same bits, each request under one key carried out once. Clients see
answers, broken connections, and refusals that name a time to come back; nothing else. Replicas and workers come back
by themselves; the driver is started again, as a service manager would, and nothing more.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest

from serve.delta import Delta
from serve.wire import Call, adapt_call, infer_call, read_infer, stream_call
from tests.serve import making
from tests.serve.serving import Serving

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(5400)]
SEED = 20
KEPT = 8  # versions of a state that the catalogue keeps
PATIENCE_S = 240.0
TITLES = {
    "replica": "ServeReplica:moepipe:inference",
    "adaptation worker": "ServeReplica:moepipe:adaptation",
    "controller": "ServeController",
    "proxy": "ProxyActor",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return making.make_bundle(tmp_path_factory.mktemp("served") / "digits")


class _Over(Exception):
    """The clients were stopped while they waited for an answer."""


@dataclass
class Books:
    """What clients were told.

    Attributes:
        acknowledged: name -> digest of each version, in order; version n is at n - 1.
        seen: how often what was answered.
        wrong: what must not happen.
        answers: reference of a state -> its first logits.
    """

    acknowledged: dict[str, list[str]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    repeated: int = 0


class Clients:
    """Threads that work against the server until :meth:`stop`; each owns its names, so it knows the next version."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.books = serving, Books()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(work, n)) for n, work in enumerate(self.works())]

    def works(self):
        return [self._adapt, self._adapt, self._stream, self._predict, self._predict]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _run(self, work, number: int) -> None:
        rng = random.Random(SEED + number)
        count = 0
        while not self._over.is_set():
            try:
                work(number, count, rng)
                self._over.wait(0.1)
            except _Over:
                return
            except Exception as error:
                self.books.wrong.append(f"{work.__name__}: {error!r}")
                return
            count += 1

    def ask(self, call: Call) -> httpx.Response:
        """Until it is answered; whatever else comes is written down. The same bytes and key each time."""
        deadline = time.monotonic() + 2 * PATIENCE_S
        attempt = 0
        while time.monotonic() < deadline:
            attempt += 1
            try:
                with httpx.Client(base_url=self.serving.url, timeout=60, trust_env=False) as http:
                    answer = http.request(call.method, call.path, **call.arguments)
            except httpx.TransportError as error:
                self.books.seen[type(error).__name__] += 1
                if self._over.is_set():
                    raise _Over from None
                time.sleep(0.3)
                continue
            self.books.seen[str(answer.status_code)] += 1
            if answer.status_code == 200:
                self.books.repeated += attempt > 1
                return answer
            if self._over.is_set():
                raise _Over
            if answer.status_code not in (429, 503, 409) or "retry-after" not in answer.headers:
                raise AssertionError(f"{call.method} {call.path}: {answer.status_code} {answer.text[:300]}")
            time.sleep(min(float(answer.headers["retry-after"]), 2.0))
        raise AssertionError(f"{call.path} was not answered in time")

    def _adapt(self, number: int, count: int, rng: random.Random) -> None:
        name = f"place-{number}-{count % 5}"
        images, _ = making.held_out(rng.choice((15, 45, 75)), 16, rng.randrange(0, 1700))
        method = rng.choice(("bn", "tent", "distill"))
        report = self.ask(adapt_call(name, images, method=method, key=uuid.uuid4().hex)).json()
        self._acknowledge(name, report)

    def _stream(self, number: int, count: int, rng: random.Random) -> None:
        name = f"flow-{number}"
        images, _ = making.held_out(45, 16, rng.randrange(0, 1700))
        call = stream_call(name, images, {"method": "bn"})
        call.arguments["headers"] = {**call.arguments["headers"], "Idempotency-Key": uuid.uuid4().hex}
        self._acknowledge(name, self.ask(call).json()["report"])

    def _acknowledge(self, name: str, report: dict) -> None:
        if not report["kept"]:
            self.books.seen["not kept"] += 1
            return
        versions = self.books.acknowledged.setdefault(name, [])
        if report["version"] != len(versions) + 1:
            raise AssertionError(f"{name}: version {report['version']} after {len(versions)}: carried out twice")
        versions.append(report["state"]["digest"])

    def _predict(self, number: int, count: int, rng: random.Random) -> None:
        known = [f"{name}.{len(versions)}" for name, versions in sorted(self.books.acknowledged.items()) if versions]
        if not known:
            time.sleep(0.1)
            return
        reference = rng.choice(known)
        images = np.random.default_rng(0).random((2, 1, 28, 28), dtype=np.float32)
        answer = self.ask(infer_call("digits", images, reference))
        head = json.loads(answer.content[: int(answer.headers["Inference-Header-Content-Length"])])
        logits = read_infer(answer)
        if head["model_version"] != reference or not np.isfinite(logits).all():
            raise AssertionError(f"{reference} was served by {head['model_version']}")
        if not np.allclose(self.books.answers.setdefault(reference, logits), logits, atol=1e-4):
            raise AssertionError(f"{reference} answers differently")


def check_states(serving: Serving, books: Books) -> int:
    """Every acknowledged version that the catalogue has to keep is there with the same bits; how many there are."""
    checked = 0
    with httpx.Client(base_url=serving.url, timeout=60, trust_env=False) as http:
        for name, versions in list(books.acknowledged.items()):
            digests = list(versions)
            for version in range(max(1, len(digests) - KEPT + 3), len(digests) + 1):  # two more may be on their way
                export = None
                for _ in range(20):
                    export = http.get(f"/v1/states/{name}/export?version={version}")
                    if export.status_code != 503:
                        break
                    time.sleep(1)
                assert export is not None and export.status_code == 200, (name, version, export)
                assert Delta.from_bytes(export.content).digest == digests[version - 1], (name, version)
                checked += 1
    return checked


def works_again(serving: Serving, since: float) -> float:
    """Seconds from ``since`` until a prediction and an adaptation (of nobody's name) are answered."""
    images, _ = making.held_out(45, 8)
    prepared = np.zeros((1, 1, 28, 28), dtype=np.float32)
    key = uuid.uuid4().hex
    calls = [infer_call("digits", prepared, None), adapt_call("probe", images, method="bn", dry_run=True, key=key)]
    for call in calls:
        while True:
            assert time.monotonic() - since < PATIENCE_S, f"Not back.\n{serving.tail()}"
            assert serving.process is not None
            if serving.process.poll() is not None:  # Ray may fail to start on a machine that is busy: once more
                serving.start()
            try:
                with httpx.Client(base_url=serving.url, timeout=60, trust_env=False) as http:
                    if http.request(call.method, call.path, **call.arguments).status_code == 200:
                        break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    return time.monotonic() - since


def strike(serving: Serving, kind: str, rng: random.Random) -> float:
    """SIGKILL; seconds until everything works again."""
    if kind == "driver":
        serving.look()
        assert serving.process is not None
        serving.process.kill()
        serving.process.wait()
        since = time.monotonic()
        # Ray's helpers may take a while; who still listened on the port would be in the way. See also Serving.stop.
        while left := [
            victim for victim in serving.family.known if victim.title.startswith("ray::Serve") and victim.alive
        ]:
            assert time.monotonic() - since < PATIENCE_S, f"Outlived the driver: {left}"
            time.sleep(0.2)
        serving.start()
    else:
        victims = serving.actors(TITLES[kind])
        while not victims:  # it is just being replaced
            time.sleep(0.2)
            victims = serving.actors(TITLES[kind])
        rng.choice(sorted(victims, key=lambda process: process.pid)).kill()
        since = time.monotonic()
    took = works_again(serving, since)
    serving.look()
    return took


def rounds(serving: Serving, deck: list[str]) -> None:
    rng = random.Random(SEED)
    rng.shuffle(deck)
    clients = Clients(serving)
    lines = []
    clients.start()
    try:
        for number, kind in enumerate(deck, start=1):
            time.sleep(rng.uniform(0.2, 4.0))
            took = strike(serving, kind, rng)
            lines.append(f"{number:>3} {kind:<18} works again after {took:6.1f} s")
            print(lines[-1], flush=True)
            assert not clients.books.wrong, clients.books.wrong
        time.sleep(2)
    finally:
        clients.stop()
    books = clients.books
    checked = check_states(serving, books)
    total = sum(len(versions) for versions in books.acknowledged.values())
    print(f"{len(deck)} kills; {total} states acknowledged, {checked} of the kept ones read back bit-equal; "
          f"{books.repeated} requests answered after repeats; clients saw {dict(books.seen)}")  # fmt: skip
    assert not books.wrong, books.wrong
    assert total > len(deck) and books.repeated > 0
    with httpx.Client(base_url=serving.url, timeout=60, trust_env=False) as http:
        for name, versions in books.acknowledged.items():  # neither fewer nor more than were acknowledged
            assert http.get(f"/v1/states/{name}").json()["version"] == len(versions)


def test_every_part_is_killed(model, tmp_path):
    with Serving(model, tmp_path, "--name", "digits") as serving:
        rounds(serving, ["replica"] * 8 + ["adaptation worker"] * 8 + ["controller"] * 2 + ["driver"] * 2)


def test_the_proxy_is_killed_too(model, tmp_path):
    with Serving(model, tmp_path, "--name", "digits", "--front", "proxy") as serving:
        rounds(serving, ["proxy"] * 2 + ["replica", "adaptation worker"])
