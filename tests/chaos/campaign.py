"""Random faults of all kinds until a hundred have hit: rounds in different places, each compared with a calm run.

One round is one pipeline in a fresh store. Faults strike at random moments, each after the system works again; the
campaign resumes whenever the driver is gone. Then digests, causes in the event log and what is left behind are checked.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orchestrator.events import Event
from tests.chaos.disturb import undisturbed
from tests.chaos.faults import CAUSES, FAULTS, SHARES
from tests.chaos.places import CHECKPOINT_EVERY, EXPERT_STEPS, Cluster, Disk, Machine, Remote

PLACES: tuple[type[Machine], ...] = (Machine, Remote, Cluster, Disk)
_DEAD_S = 900.0  # a round that takes longer is stuck
_STUCK_S = 180.0  # a fault after which nothing moves for so long
_ONE_STEP_S = 0.7  # of a busy machine: the fault may come while a step is computed
_LASTING = ("object", "pause", "store away", "store silent", "disk full")  # processes live on, most of them
_SCARCE = ("rank", "damage")  # only possible for a part of a round


@dataclass
class Strike:
    """One fault and what came of it.

    Attributes:
        number: from 1, over all rounds.
        round: name of the round.
        kind: key of ``FAULTS``.
        title: what it hit.
        time: when it began, seconds since 1970.
        nodes: members that it hit; empty: all that ran.
        intervals: how many checkpoint intervals it may cost.
        recovered_by: ``scheduler`` or ``resume``.
        recovery_s: seconds from its begin to the next progress of what it hit.
        repeated: member -> updates it did twice because of it.
        causes: what failures after it were charged to.
    """

    number: int
    round: str
    kind: str
    title: str
    time: float
    nodes: list[str]
    intervals: int = 1
    recovered_by: str = "scheduler"
    recovery_s: float = 0.0
    repeated: dict[str, int] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """Checkpoint intervals of work that one member did twice, at most."""
        return max(self.repeated.values(), default=0) / CHECKPOINT_EVERY


@dataclass
class Round:
    """One pipeline.

    Attributes:
        name: of its folder.
        place: where.
        seconds: how long it took.
        finished: it came to its end.
        equal: all digests are those of the calm run.
        strikes: its faults.
        wrong: whatever else was not as it should be.
        staged: folders of killed processes that ``moepipe gc`` removed.
    """

    name: str
    place: str
    seconds: float = 0.0
    finished: bool = False
    equal: bool = False
    strikes: list[Strike] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    staged: int = 0


class Campaign:
    """Rounds until all faults of the deck have hit.

    Args:
        folder: new, for all rounds.
        faults: how many.
        seed: of kinds and moments.
        kinds: which; None: all.
        most: faults in one round.
        say: takes lines of progress.
    """

    def __init__(
        self,
        folder: Path,
        faults: int,
        seed: int,
        kinds: Sequence[str] | None = None,
        most: int = 12,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.seed, self.most, self.say = folder, seed, most, say
        self.rng = random.Random(seed)
        self.deck = make_deck(faults, self.rng, tuple(kinds or SHARES))
        self.rounds: list[Round] = []
        self.count = 0
        self.total = len(self.deck)

    def run(self) -> list[Round]:
        """The whole campaign."""
        start = time.monotonic()
        calm = Machine(self.folder / "calm")
        self.expected = undisturbed(calm)
        self.say(f"The calm run took {time.monotonic() - start:.0f} s.")
        barren = 0
        while self.deck and barren < 3:
            place = self.rng.choice([place for place in PLACES if set(place.kinds) & set(self.deck)])
            before = self.count
            self.round(place)
            barren = barren + 1 if self.count == before else 0
            self.write()
        return self.rounds

    def write(self) -> None:
        """Keep what is known so far."""
        document = {"seed": self.seed, "checkpoint_every": CHECKPOINT_EVERY, "rounds": [asdict(r) for r in self.rounds]}
        (self.folder / "campaign.json").write_text(json.dumps(document, indent=1))

    def round(self, kind: type[Machine]) -> None:
        """One round in one place."""
        name = f"{kind.__name__.lower()}{len(self.rounds) + 1}"
        done = Round(name, kind.__name__.lower())
        self.rounds.append(done)
        place = kind(self.folder / name)
        start = time.monotonic()
        try:
            place.open()
            place.begin()
            self.disturb(place, done)
            done.finished = True
            found = place.artifacts()
            done.equal = found == self.expected
            if not done.equal:
                done.wrong.append(f"other digests: {[n for n in self.expected if found.get(n) != self.expected[n]]}")
            done.wrong += place.left_over()
            done.staged = place.staged
        except Exception as error:
            done.wrong.append(f"{type(error).__name__}: {error}"[:3000])
        finally:
            done.seconds = time.monotonic() - start
            place.look()
            place.close()
            self.account(place, done)
            place.family.clear()
        bad = f" WRONG: {'; '.join(done.wrong)}" if done.wrong else ""
        self.say(f"[{self.count}/{self.total}] {name}: {len(done.strikes)} faults, {done.seconds:.0f} s.{bad}")

    def disturb(self, place: Machine, done: Round) -> None:
        """Strike, wait until it works again, strike; until the pipeline has finished."""
        struck: Strike | None = None
        due, end = self.next(), time.monotonic() + _DEAD_S
        resumes = 0
        while True:
            assert time.monotonic() < end, f"the round does not end: {place.tail()}"
            time.sleep(0.1)
            place.look()
            assert place.process is not None
            if place.process.poll() is not None:
                if place.ended() == "finished":
                    return
                assert struck is not None, f"it ended without a fault: {place.tail()}"
                struck.recovered_by = "resume"
                resumes += 1
                assert resumes <= 3 * len(done.strikes), f"resumes don't help: {place.tail()}"
                place.again(self.rng)
                continue
            if struck is not None and not struck.recovery_s:
                moved = moved_after(place.events(), struck)
                if moved is None:
                    assert time.time() - struck.time < _STUCK_S, f"nothing moves after {struck.kind}: {place.tail()}"
                    continue
                struck.recovery_s = moved - struck.time
                due = self.next()
            if len(done.strikes) < self.most and time.monotonic() >= due:
                found = self.strike(place, done.name)
                if found is not None:
                    struck = found
                    done.strikes.append(found)

    def next(self) -> float:
        """When the next fault is due."""
        return time.monotonic() + self.rng.uniform(0.2, 2.5)

    def strike(self, place: Machine, name: str) -> Strike | None:
        """Do what is possible now and still on the deck."""
        kinds = [kind for kind in dict.fromkeys(self.deck) if kind in place.kinds]
        for kind in sorted(kinds, key=lambda kind: kind not in _SCARCE):
            now = time.time()
            hit = FAULTS[kind](place, self.rng)
            if hit is not None:
                self.deck.remove(kind)
                self.count += 1
                self.say(f"  {self.count:>3} {name} {kind}: {hit.title[:80]}")
                return Strike(self.count, name, kind, hit.title[:120], now, sorted(hit.nodes), hit.intervals)
        return None

    def account(self, place: Machine, done: Round) -> None:
        """Work done twice, causes of failures, and whether both are as they may be."""
        done.wrong += charge(place.journal(), done.strikes)
        for event in place.events():
            if event.kind == "member-failed":
                blamed = [strike for strike in done.strikes if strike.time <= event.time]
                if not blamed:
                    done.wrong.append(f"a failure before all faults: {event.data['line']}")
                    continue
                cause = str(event.data["cause"])
                blamed[-1].causes.append(cause)
                # The last one, or the one before it whose failures are still coming in.
                if not any(cause in CAUSES[strike.kind] for strike in blamed[-2:]):
                    done.wrong.append(f"after {blamed[-1].kind}: {event.data['line']}"[:300])
        for strike in done.strikes:
            if strike.lost > strike.intervals:
                done.wrong.append(f"{strike.kind} cost {strike.lost:.2f} intervals")


def charge(journal: Sequence[tuple[float, str, int]], strikes: Sequence[Strike]) -> list[str]:
    """Charge what each member did twice to the fault that interrupted it; what is left unexplained, in words.

    A member that begins again at step k after step d did d + 1 - k steps twice. It was interrupted right after step d,
    so by the latest fault that had begun by then, however much later it begins again.
    """
    wrong: list[str] = []
    last: dict[str, tuple[float, int]] = {}
    for when, member, step in journal:
        before, reached = last.get(member, (0.0, -1))
        if step <= reached:
            blamed = [strike for strike in strikes if strike.time <= before + _ONE_STEP_S]
            if step == 0 and reached + 1 >= EXPERT_STEPS:  # it had finished, and what it made was damaged afterwards
                blamed = [strike for strike in strikes if strike.time <= when and "artifact" in strike.title]
            if blamed:
                known = blamed[-1].repeated
                known[member] = known.get(member, 0) + reached + 1 - step
            else:
                wrong.append(f"{member} did step {step} twice although nothing had happened")
        last[member] = (when, step)
    return wrong


def moved_after(events: Sequence[Event], strike: Strike) -> float | None:
    """When something that the fault hit made progress again, or the run ended well.

    After a fault that ends processes, progress counts from a new start on: words of the dead may still be under way.
    """
    begun: set[str] = set()
    for event in events:
        if event.time <= strike.time + (2.0 if strike.kind == "pause" else 0.0):  # words still under way
            continue
        if event.kind == "run-finished" and event.data["status"] == "finished":
            return event.time
        if strike.nodes and event.node not in strike.nodes:
            continue
        if event.kind == "member-started":
            begun.add(event.node)
        if event.kind == "member-finished" or (event.kind == "member-hit" and strike.nodes):
            return event.time
        if event.kind == "member-progress" and (event.node in begun or strike.kind in _LASTING):
            return event.time
    return None


def make_deck(faults: int, rng: random.Random, kinds: Sequence[str]) -> list[str]:
    """``faults`` kinds in random order, in proportion to their shares, each at least once if there is room."""
    whole = sum(SHARES[kind] for kind in kinds)
    deck: list[str] = []
    for kind in kinds:
        deck += [kind] * max(1, round(faults * SHARES[kind] / whole))
    rng.shuffle(deck)
    while len(deck) < faults:
        deck.append(rng.choice(list(kinds)))
    return deck[:faults] if faults < len(kinds) else deck
