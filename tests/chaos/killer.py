"""Finds the processes below one driver and ends one of them with SIGKILL.

Only the tree below a given pid is looked at, never the whole machine, and a process is identified by pid and start
time, so a reused number is never hit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import psutil

Kind = Literal["driver", "raylet", "gcs", "train", "member", "other"]
KINDS: tuple[Kind, ...] = ("driver", "member", "train", "raylet")


@dataclass(frozen=True)
class Victim:
    """A process that may be killed.

    Attributes:
        kind: what it is to the run.
        pid: its number.
        born: its start time; with the number, its identity.
        title: what it calls itself.
    """

    kind: Kind
    pid: int
    born: float
    title: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill(self) -> bool:
        """SIGKILL; False when it had already gone."""
        if not self.alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            return True
        return False


def kind_of(command: list[str]) -> Kind:
    """What a process below a driver is, by the command line that Ray gives it."""
    title = command[0] if command else ""
    if os.path.basename(title) == "raylet":
        return "raylet"
    if os.path.basename(title) == "gcs_server":
        return "gcs"
    if not title.startswith("ray::") or title.startswith("ray::IDLE"):
        return "other"
    if "TrainWorker" in title:
        return "train"
    return "member" if "MemberRunner" in title else "other"


@dataclass
class Family:
    """The processes that ever were below some drivers.

    Attributes:
        known: everybody seen so far, for the hunt for orphans at the end.
    """

    known: set[Victim] = field(default_factory=set)

    def look(self, driver: int) -> list[Victim]:
        """Who lives below ``driver`` now, itself first; empty when it has ended."""
        found: list[Victim] = []
        for process in _tree(driver):
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = process.cmdline()
                kind: Kind = "driver" if process.pid == driver else kind_of(command)
                found.append(Victim(kind, process.pid, process.create_time(), " ".join(command)[:120]))
        self.known |= set(found)
        return found

    def pick(self, driver: int, kind: Kind, rng: random.Random) -> Victim | None:
        """One process of ``kind`` below ``driver`` at random, or None when there is none now.

        An actor that works on a member says so in its title; one that is idle is spared.
        """
        candidates = [victim for victim in self.look(driver) if victim.kind == kind]
        if kind == "member":
            candidates = [victim for victim in candidates if "MemberRunner.run" in victim.title]
        return rng.choice(sorted(candidates, key=lambda victim: victim.pid)) if candidates else None

    def orphans(self, patience_s: float) -> list[Victim]:
        """Who of the known is still alive after waiting up to ``patience_s`` seconds."""
        end = time.monotonic() + patience_s
        while (left := [victim for victim in self.known if victim.alive]) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def clear(self) -> None:
        """Kill whoever of the known is left. For clean-up; a test that needs it has found a bug."""
        for victim in self.known:
            victim.kill()


def _tree(pid: int) -> Iterator[psutil.Process]:
    try:
        root = psutil.Process(pid)
        yield root
        yield from root.children(recursive=True)
    except psutil.NoSuchProcess:
        return
