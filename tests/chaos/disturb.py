"""Runs a pipeline through the real command line while somebody kills its processes, and keeps the books.

One *round* is one pipeline in a fresh store: submit, strike at random moments, resume whenever the driver is gone,
until it has finished; then its artifacts are compared with those of the undisturbed run. Rounds follow until enough
strikes hit.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.events import Event, read_events
from tests.chaos.killer import KINDS, Family, Kind

ROOT = Path(__file__).resolve().parents[2]
_RESUMED = re.compile(r"(?:Resumed|continues) at step (\d+)")
_DEAD_S = 1800.0  # a round that takes longer is stuck
_MOST = 7  # strikes in one round


@dataclass
class Strike:
    """One kill and what came of it.

    Attributes:
        number: from 1, over all rounds.
        round: in which round.
        kind: what was killed.
        title: its name.
        time: when, seconds since 1970.
        recovered_by: ``scheduler`` (the driver went on) or ``resume``.
        recovery_s: seconds from the kill to the next step or end of a member.
        repeated: member -> steps it did twice because of this strike.
    """

    number: int
    round: int
    kind: Kind
    title: str
    time: float
    recovered_by: str = "scheduler"
    recovery_s: float = 0.0
    repeated: dict[str, int] = field(default_factory=dict)


@dataclass
class Arena:
    """Where a round takes place.

    Attributes:
        pipeline: the YAML.
        folder: of this round; the store is in it.
        arguments: further arguments of ``submit``.
        data_root: folder with data sets.
    """

    pipeline: Path
    folder: Path
    arguments: Sequence[str] = ()
    data_root: Path | None = None

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def environment(self) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MOEPIPE_", "RAY_"))}
        env |= {
            "MOEPIPE_STORE": str(self.store),
            "MOEPIPE_TEST_JOURNAL": str(self.folder / "journal"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        return env | ({"MOEPIPE_DATA": str(self.data_root)} if self.data_root else {})

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A ``moepipe`` process in the background; what it prints is appended to ``output.txt``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.support.launch", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def submit(self) -> subprocess.Popen[bytes]:
        """Start the pipeline."""
        return self.start("submit", str(self.pipeline), *self.arguments)

    def runs(self) -> list[Path]:
        """Folders of the runs so far, oldest first."""
        found = (self.store / "runs").glob("*/run.json")
        return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]

    def events(self) -> list[Event]:
        """Events of all runs in the order of time."""
        found = [event for run in self.runs() for event, _ in read_events(run / "events.jsonl")]
        return sorted(found, key=lambda event: event.time)

    def ended(self) -> str | None:
        """Status of the newest run, None while it goes on."""
        runs = self.runs()
        if not runs:
            return None
        last = [event for event, _ in read_events(runs[-1] / "events.jsonl")][-1:]
        return last[0].data["status"] if last and last[0].kind == "run-finished" else None

    def artifacts(self) -> dict[str, str]:
        """Node -> digest of the finished run."""
        found: dict[str, str] = json.loads((self.runs()[-1] / "artifacts.json").read_text())
        return found

    def journal(self) -> list[tuple[float, str, int]]:
        """(time, member, step) of every step really executed, in order; only the chaos stages write it."""
        path = self.folder / "journal"
        lines = [line.rsplit(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []
        return [(float(head.split(" ", 1)[0]), head.split(" ", 1)[1], int(step)) for head, step in lines]

    def tail(self) -> str:
        """The last words of the command line, for messages of failed tests."""
        return (self.folder / "output.txt").read_text(errors="replace")[-3000:]


def undisturbed(arena: Arena) -> dict[str, str]:
    """Run to the end in peace; node -> digest."""
    process = arena.submit()
    assert process.wait(_DEAD_S) == 0, arena.tail()
    return arena.artifacts()


def disturbed(
    arena: Arena,
    deck: list[Kind],
    rng: random.Random,
    family: Family,
    strikes: list[Strike],
    number: int,
    pause_s: tuple[float, float] = (0.3, 4.0),
) -> dict[str, str]:
    """One round; takes kinds off ``deck`` as they are hit and appends to ``strikes``. Node -> digest."""
    process = arena.submit()
    end = time.monotonic() + _DEAD_S
    struck: Strike | None = None
    ends = 0
    due = _next(rng, pause_s)
    while True:
        assert time.monotonic() < end, f"The round does not end.\n{arena.tail()}"
        time.sleep(0.05)
        family.look(process.pid)
        if process.poll() is not None:
            if arena.ended() == "finished":
                break
            # Killed before the run record existed: nothing to resume, submit again.
            runs = arena.runs()
            assert struck is not None and not struck.recovery_s, f"It ended without being hit.\n{arena.tail()}"
            struck.recovered_by = "resume"
            ends += 1
            assert ends <= 2 * len(strikes), f"Resumes don't help.\n{arena.tail()}"
            process = arena.start("resume", runs[-1].name) if runs else arena.submit()
            due = _next(rng, pause_s)
            continue
        if struck is not None and not struck.recovery_s:
            moved = _first_step_after(arena.events(), struck.time)
            if moved is None:
                continue  # the next strike waits until the system works again
            struck.recovery_s = moved - struck.time
            due = _next(rng, pause_s)
        mine = sum(strike.round == number for strike in strikes)
        if deck and mine < _MOST and time.monotonic() >= due and (struck is not None or _working(arena.events())):
            struck = _strike(process.pid, deck, rng, family, len(strikes) + 1, number) or struck
            if struck is not None and struck not in strikes:
                strikes.append(struck)
    return arena.artifacts()


def _next(rng: random.Random, pause_s: tuple[float, float]) -> float:
    return time.monotonic() + rng.uniform(*pause_s)


def _strike(
    driver: int, deck: list[Kind], rng: random.Random, family: Family, number: int, round_: int
) -> Strike | None:
    """Kill the first kind on the deck that lives now; it is taken off."""
    for kind in list(deck):
        victim = family.pick(driver, kind, rng)
        if victim is None:
            continue
        now = time.time()
        if victim.kill():
            deck.remove(kind)
            return Strike(number, round_, kind, victim.title, now)
    return None


def shuffled_deck(rng: random.Random, kills: int) -> list[Kind]:
    """``kills`` kinds, all four equally often as far as it divides, in random order."""
    deck = [KINDS[index % len(KINDS)] for index in range(kills)]
    rng.shuffle(deck)
    return deck


def _working(events: Sequence[Event]) -> bool:
    return any(event.kind == "member-started" for event in events)


def _first_step_after(events: Sequence[Event], moment: float) -> float | None:
    moves = ("member-progress", "member-finished", "run-finished")
    return next((event.time for event in events if event.time > moment and event.kind in moves), None)


def account(arena: Arena, strikes: Sequence[Strike]) -> None:
    """Fill in the ``repeated`` of a round's strikes: exactly where there is a journal, else from the run record."""
    if journal := arena.journal():
        account_exactly(journal, strikes)
    else:
        account_by_record(arena.events(), strikes)


def account_by_record(events: Sequence[Event], strikes: Sequence[Strike]) -> None:
    """Charge every step that a member did twice to the latest strike before it.

    A member that begins again at step k (it says so in its log; else 0) after it had reported d > k steps did d - k of
    them twice. Progress is reported at most five times a second, so steps after the last report are not seen here.
    """
    done: dict[str, int] = {}
    begun: dict[str, int] = {}
    for event in events:
        data: Any = event.data
        if event.kind == "member-started":
            begun[event.node] = 0
        elif event.kind == "member-log" and (match := _RESUMED.search(str(data.get("message", "")))):
            begun[event.node] = int(match[1])
        elif event.kind == "member-progress" and "done" in data:
            if event.node in begun:
                again = done.get(event.node, 0) - begun.pop(event.node)
                blamed = [strike for strike in strikes if strike.time <= event.time]
                if again > 0 and blamed:
                    blamed[-1].repeated[event.node] = blamed[-1].repeated.get(event.node, 0) + again
            done[event.node] = int(data["done"])


def account_exactly(journal: Sequence[tuple[float, str, int]], strikes: Sequence[Strike]) -> None:
    """Charge every step that was executed again to the latest strike before that, from the journal."""
    seen: set[tuple[str, int]] = set()
    for when, member, step in journal:
        if (member, step) in seen:
            blamed = [strike for strike in strikes if strike.time <= when]
            assert blamed, f"{member} did step {step} twice although nothing was killed."
            blamed[-1].repeated[member] = blamed[-1].repeated.get(member, 0) + 1
        seen.add((member, step))


def table(strikes: Sequence[Strike]) -> str:
    """What happened, one line per strike."""
    lines = [f"{'#':>3} {'round':>5} {'killed':<8} {'recovered by':<12} {'after s':>8} {'steps twice':>12}  process"]
    for strike in strikes:
        lines.append(
            f"{strike.number:>3} {strike.round:>5} {strike.kind:<8} {strike.recovered_by:<12} "
            f"{strike.recovery_s:>8.1f} {max(strike.repeated.values(), default=0):>12}  {strike.title[:60]}"
        )
    worst = max((max(strike.repeated.values(), default=0) for strike in strikes), default=0)
    by_kind = ", ".join(f"{kind} {sum(strike.kind == kind for strike in strikes)}" for kind in KINDS)
    lines.append(f"{len(strikes)} kills ({by_kind}); most steps done twice by one member after one kill: {worst}")
    return "\n".join(lines)
