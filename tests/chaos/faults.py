"""The faults of the campaign: each is one function that does the whole of it at this moment, or says that it cannot."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.killer import Kind, Victim
from tests.chaos.places import CHECKPOINT_EVERY, EXPERT_STEPS, Cluster, Disk, Machine, Remote


@dataclass
class Hit:
    """What was done.

    Attributes:
        title: to what, for the log.
        nodes: members that it hit; empty when all.
        intervals: how many checkpoint intervals of work this may cost.
    """

    title: str
    nodes: set[str] = field(default_factory=set)
    intervals: int = 1


Fault = Callable[[Machine, random.Random], Hit | None]


def _kill(kind: Kind) -> Fault:
    def fault(place: Machine, rng: random.Random) -> Hit | None:
        work = place.at_work()
        if not work and kind != "driver":
            return None
        if kind == "train" and not any(node.startswith("distill") for node in work):
            return None
        victim = _driver(place) if kind == "driver" else place.pick(kind, rng)
        if victim is None or (kind == "member" and victim.pid not in work.values()) or not victim.kill():
            return None
        return Hit(victim.title, _of(work, victim, kind))

    return fault


def _driver(place: Machine) -> Victim | None:
    assert place.process is not None
    return next((victim for victim in place.look() if victim.pid == place.process.pid), None)


def _of(work: dict[str, int], victim: Victim, kind: str) -> set[str]:
    """The members that a process works for."""
    if kind == "train":
        return {node for node in work if node.startswith("distill")}
    return {node for node, pid in work.items() if pid == victim.pid}


def _order(*words: str) -> Fault:
    """Something that only the driver itself can do."""

    def fault(place: Machine, rng: random.Random) -> Hit | None:
        if not place.at_work():
            return None
        orders, done = place.folder / "orders", place.folder / "orders.done"
        before = len(done.read_text().splitlines()) if done.exists() else 0
        word = rng.choice(words)
        orders.write_text(word)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            lines = done.read_text().splitlines() if done.exists() else []
            if len(lines) > before:
                told = json.loads(lines[-1])
                return Hit(f"{word} {told['node']}", {told["node"]} if word == "actor" else set())
            time.sleep(0.1)
        orders.unlink(missing_ok=True)
        return None

    return fault


def _stop(seconds: tuple[float, float] | None) -> Fault:
    """A process stands still, for so many seconds or for good."""

    def fault(place: Machine, rng: random.Random) -> Hit | None:
        work = place.at_work()
        kind: Kind = rng.choice(["member", "train"])
        if kind == "train" and not any(node.startswith("distill") for node in work):
            kind = "member"
        victim = place.pick(kind, rng)
        if victim is None or not (nodes := _of(work, victim, kind)):
            return None
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGSTOP)
            if seconds is None:
                return Hit(f"{victim.title}, for good", nodes)
            length = rng.uniform(*seconds)
            time.sleep(length)
            os.kill(victim.pid, signal.SIGCONT)
            return Hit(f"{victim.title}, for {length:.1f} s", nodes)
        return None

    return fault


def _damage(place: Machine, rng: random.Random) -> Hit | None:
    """An artifact that is still to be read, or the newest checkpoint of a member that dies with it."""
    work, events = place.at_work(), place.events()
    started = {event.node for event in events if event.kind == "member-started"}
    made = [
        event.data["digest"]
        for event in events
        if event.kind in ("member-finished", "member-hit") and event.node.startswith("experts")
    ]
    if made and not any(node.startswith("distill") for node in started):
        path = place.store / "artifacts" / rng.choice(made) / "weights.npy"
        if not path.exists():
            return None
        # A finished member has no checkpoints any more: it is made again from its beginning.
        return Hit(
            f"{_spoil(path, rng)} of an artifact", {"distill/seed=0"}, intervals=EXPERT_STEPS // CHECKPOINT_EVERY
        )
    victim = place.pick("member", rng)
    nodes = _of(work, victim, "member") if victim is not None else set()
    if victim is None or not nodes:
        return None
    keys = {event.node: event.data["key"] for event in events if event.kind == "member-started"}
    folder = place.store / "scratch" / keys[next(iter(nodes))] / "checkpoints"
    newest = sorted(
        [path for path in folder.glob("step-*") if path.is_file()] or folder.glob("step-*/state.safetensors")
    )
    if len(newest) < 2 or not victim.kill():
        return None
    with suppress(FileNotFoundError):
        return Hit(f"{_spoil(newest[-1], rng)} of a checkpoint, and {victim.title}", nodes, intervals=2)
    return Hit(victim.title, nodes)


def _spoil(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(data[: rng.randrange(len(data))])
        return "a part cut off"
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "one bit"


def _full(place: Machine, rng: random.Random) -> Hit | None:
    assert isinstance(place, Disk)
    if not place.at_work():
        return None
    filler, length = place.store / "filler", rng.uniform(1, 5)
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 12))
    time.sleep(length)
    filler.unlink()
    return Hit(f"for {length:.1f} s")


def _network(how: str) -> Fault:
    def fault(place: Machine, rng: random.Random) -> Hit | None:
        assert isinstance(place, Remote)
        if not place.at_work():
            return None
        length = rng.uniform(3, 9)
        getattr(place.proxy, how)(True)
        time.sleep(length)
        getattr(place.proxy, how)(False)
        return Hit(f"for {length:.1f} s")

    return fault


def _at_node(act: Callable[[Cluster, random.Random, str, list[psutil.Process]], str]) -> Fault:
    """What ``act`` does to a node on which members run, given its name and processes; it says how that went."""

    def fault(place: Machine, rng: random.Random) -> Hit | None:
        assert isinstance(place, Cluster)
        busy, work = place.busy_nodes(), place.at_work()
        if not busy or not work:
            return None
        name = rng.choice(sorted(busy))
        here = {process.pid for process in busy[name]}
        members = {node for node, pid in work.items() if pid in here}
        # A gang may have its runner elsewhere.
        members = members or {node for node in work if node.startswith("distill")}
        return Hit(f"{name[:8]}, {act(place, rng, name, busy[name])}", members)

    return fault


def _crash(place: Cluster, rng: random.Random, name: str, processes: list[psutil.Process]) -> str:
    place.look()
    noticed = place.tell("crash", name)["noticed"]
    place.state = place.tell("add")
    return f"noticed after {noticed:.1f} s"


def _notice(place: Cluster, rng: random.Random, name: str, processes: list[psutil.Process]) -> str:
    seconds = rng.uniform(6, 12)
    answer = place.tell("drain", name, seconds)
    assert answer["accepted"], answer
    place.state = place.tell("add")  # as a cloud's autoscaler would
    time.sleep(max(0.0, seconds - 5))
    place.look()
    place.tell("crash", name)
    place.state = place.tell("state")
    return f"{seconds:.0f} s ahead"


def _cut(place: Cluster, rng: random.Random, name: str, processes: list[psutil.Process]) -> str:
    """The node stands still until the head gives it up, and then comes back."""
    place.look()
    for process in processes:
        with suppress(Exception):
            process.suspend()
    noticed = place.tell("given_up", name)["noticed"]
    for process in processes:
        with suppress(Exception):
            process.resume()
    time.sleep(2)
    place.tell("crash", name)
    place.state = place.tell("add")
    return f"given up after {noticed:.1f} s"


def _head(place: Machine, rng: random.Random) -> Hit | None:
    assert isinstance(place, Cluster)
    if not place.at_work():
        return None
    place.end_cluster()
    place.open()
    return Hit("everything of the cluster, with the driver")


FAULTS: dict[str, Fault] = {
    "worker": _kill("member"),
    "rank": _kill("train"),
    "actor": _order("actor"),
    "raylet": _kill("raylet"),
    "gcs": _kill("gcs"),
    "driver": _kill("driver"),
    "object": _order("object", "sink"),
    "pause": _stop((6.0, 9.0)),
    "freeze": _stop(None),
    "damage": _damage,
    "disk full": _full,
    "store away": _network("refuse"),
    "store silent": _network("stall"),
    "node": _at_node(_crash),
    "spot notice": _at_node(_notice),
    "cut": _at_node(_cut),
    "head": _head,
}
CAUSES: dict[str, set[str]] = {
    **{kind: {"infrastructure"} for kind in FAULTS},
    "driver": set(),
    "pause": set(),
    "store away": set(),
    "store silent": set(),
    "head": set(),
    "damage": {"user", "infrastructure", "upstream"},
    "disk full": {"user", "upstream"},
    "spot notice": {"preemption"},
}
"""What a failure after such a fault may be charged to."""
SHARES = {
    "worker": 8,
    "rank": 7,
    "actor": 7,
    "raylet": 6,
    "gcs": 5,
    "driver": 8,
    "object": 7,
    "pause": 7,
    "freeze": 5,
    "damage": 7,
    "disk full": 4,
    "store away": 6,
    "store silent": 5,
    "node": 5,
    "spot notice": 5,
    "cut": 3,
    "head": 3,
}
"""How often of a hundred."""
