"""Population-based training: members train side by side, and from time to time bad ones go on from good ones.

All members train ``interval`` updates; then the worst share of them takes over the whole training state and the
settings of one of the best (*exploit*) and changes the settings (*explore*); and so on until training ends. What a
member does between two selections is a segment (:mod:`workers.segments`), a trial like any other.

Source: Jaderberg et al., "Population based training of neural networks", arXiv 1711.09846: truncation selection,
factors 0.8 and 1.2, resampling from the space.
Differs: the population waits for its slowest member at every selection (the paper's members do not), so that who copies
whom is a function of scores and seed alone. All members share one seed, hence initial weights and batches, so that they
differ by their settings alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from workers.search_propose import Answer, Mode, random_points
from workers.search_space import Dimension, Space, Values, identity
from workers.segments import FROM, UNTIL

END = 10**9
"""Updates that no run does."""
_TRIES = 20


class PopulationSettings(BaseModel):
    """How a population lives."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(ge=1, le=1000, description="members that train side by side")
    interval: int = Field(ge=1, description="updates between two selections")
    quantile: float = Field(
        default=0.25, ge=0, le=0.5, description="share that is replaced by copies of as many at the top; 0: nobody is"
    )
    resample: float = Field(
        default=0.25, ge=0, le=1, description="probability that a copy draws a field anew, instead of a small change"
    )
    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        default=(0.8, 1.2), description="a number is changed a little by one of these; a choice moves to a neighbour"
    )


class Change(BaseModel):
    """A part of a schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: int | None = Field(default=None, ge=1, description="updates after which the next part begins; null: the end")
    values: dict[str, Any] = Field(description="dotted path in the stage's config -> value during this part")


@dataclass
class Step:
    """A segment of one member.

    Attributes:
        number: of the trial.
        generation: from 0.
        member: from 0.
        values: its settings.
        until: updates at its end.
        parent: trial whose state it goes on from; None in generation 0.
        copied: the parent is another member's.
        left: updates that are left to do; None until it has ended well.
        objective: its score; None until then.
        artifact: digest.
    """

    number: int
    generation: int
    member: int
    values: Values
    until: int
    parent: int | None = None
    copied: bool = False
    left: int | None = None
    objective: float | None = None
    artifact: str = ""

    def record(self) -> dict[str, Any]:
        """What the table of trials keeps of it."""
        kept = ("generation", "member", "parent", "copied", "until", "left")
        return {name: value for name, value in asdict(self).items() if name in kept}


class Segments:
    """Proposes segments; when all that were proposed have ended, :meth:`select` adds more, or it is over.

    See :class:`workers.search_propose.Proposer`.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.generation = 0
        self.planned = 0
        """Segments in all, as far as it is known."""
        self._given = 0
        self._told: set[int] = set()

    def select(self) -> None:
        """Add the segments of generation ``self.generation``, which has just begun."""
        raise NotImplementedError

    def add(self, member: int, values: Values, until: int, parent: Step | None) -> None:
        """Propose a segment of this generation."""
        number = len(self.steps)
        copied = parent is not None and parent.member != member
        source = None if parent is None else parent.number
        self.steps.append(Step(number, self.generation, member, values, until, source, copied))

    def ask(self) -> Answer:
        """The next segment, with where it begins and ends beside its settings."""
        if self._given == len(self.steps):
            return "done" if len(self._told) == len(self.steps) else "wait"
        step = self.steps[self._given]
        self._given += 1
        where: Values = {UNTIL: step.until}
        if step.parent is not None:
            where[FROM] = self.steps[step.parent].artifact
        return {**step.values, **where}

    def made(self, number: int, artifact: str, left: int) -> None:
        """Segment ``number`` has made an artifact; ``left`` updates are left to do. Before :meth:`tell`."""
        step = self.steps[number]
        step.artifact, step.left = artifact, left
        before = None if step.parent is None else self.steps[step.parent]
        if before is not None and before.left is not None:
            step.until = min(step.until, before.until + before.left)

    def tell(self, number: int, objective: Sequence[float] | None) -> None:
        """The score of a segment; None: it failed. The last one of a generation begins the next one."""
        self.steps[number].objective = None if objective is None else float(objective[0])
        self._told.add(number)
        if len(self._told) < len(self.steps):
            return
        self.generation += 1
        self.select()
        if len(self._told) == len(self.steps):
            self.planned = len(self.steps)

    def latest(self) -> list[Step]:
        """The segments that have just ended."""
        return [step for step in self.steps if step.generation == self.generation - 1]


class Population(Segments):
    """See the top of this file.

    Args:
        space: of the settings that change.
        settings: of the population.
        mode: whether the largest or the smallest score is best.
        seed: of the first settings and of all choices.
        first: settings of the first members; the others are drawn.
    """

    def __init__(
        self, space: Space, settings: PopulationSettings, mode: Mode, seed: int, first: Sequence[Values] = ()
    ) -> None:
        super().__init__()
        self.space, self.settings, self._seed = space, settings, seed
        self._sign = 1.0 if mode == "max" else -1.0
        self.planned = settings.size
        points = list(itertools.islice(random_points(space, seed, first, ()), settings.size))
        for member in range(settings.size):  # a space of fewer points: several begin alike
            self.add(member, dict(points[member % len(points)]), settings.interval, None)

    def made(self, number: int, artifact: str, left: int) -> None:
        """See the base class."""
        super().made(number, artifact, left)
        generations = math.ceil((self.steps[number].until + left) / self.settings.interval)
        self.planned = max(self.planned, self.settings.size * generations)

    def select(self) -> None:
        """Truncation selection. Members that have come to their end, or that nobody replaces, take part no longer."""
        now, settings = self.latest(), self.settings
        able = [step for step in now if step.objective is not None and step.left]
        failed = [step for step in now if step.objective is None]
        ranked = sorted(able, key=lambda step: (-self._score(step), step.member))
        everybody = len(able) + len(failed)
        count = min(math.ceil(settings.quantile * everybody), everybody // 2)
        sources = ranked[: max(1, count)] if settings.quantile else []
        worst = set() if count <= len(failed) else {step.member for step in ranked[len(failed) - count :]}
        until = (self.generation + 1) * settings.interval
        for step in now:
            source = None
            if sources and (step.member in worst or step in failed):
                source = sources[int(self._draw(step.member, "source") * len(sources))]
            if step in able and (source is None or self._score(step) >= self._score(source)):
                self.add(step.member, step.values, until, step)
            elif source is not None:
                self.add(step.member, self._explored(step.member, source), until, source)

    def _explored(self, member: int, source: Step) -> Values:
        """Changed settings that no other copy of ``source`` has, as far as that can be."""
        known = [step.values for step in self.steps if step.parent == source.number] + [source.values]
        values: Values = {}
        for attempt in range(_TRIES):

            def draw(name: str, attempt: int = attempt) -> float:
                return self._draw(member, f"{attempt}/{name}")

            values = explore(self.space, source.values, self.settings, draw)
            if values not in known:
                break
        return values

    def _score(self, step: Step) -> float:
        return -math.inf if step.objective is None else self._sign * step.objective

    def _draw(self, member: int, name: str) -> float:
        """A number in [0, 1) for this generation, member and name."""
        text = hashlib.sha256(f"{self._seed}/{self.generation}/{member}/{name}".encode()).digest()
        return float(np.random.default_rng(int.from_bytes(text[:16], "big")).random())


class Schedule(Segments):
    """One run whose settings change at given updates, such as those that a population found.

    Args:
        changes: in order.
    """

    def __init__(self, changes: Sequence[Change]) -> None:
        super().__init__()
        self._changes = changes
        self.planned = len(changes)
        self.add(0, dict(changes[0].values), changes[0].until or END, None)

    def select(self) -> None:
        """The next entry."""
        (before,) = self.latest()
        if before.objective is not None and before.left and self.generation < len(self._changes):
            change = self._changes[self.generation]
            self.add(0, dict(change.values), change.until or END, before)


def explore(space: Space, values: Values, settings: PopulationSettings, draw: Callable[[str], float]) -> Values:
    """Changed settings: each field is drawn anew or changed a little; conditions hold afterwards."""
    new: Values = {}
    for name in space.order():
        if not space.active(name, new):
            continue
        dimension = space.dimensions[name]
        if name not in values or draw(f"{name}/resample") < settings.resample:
            new[name] = dimension.at(draw(f"{name}/value"))
        else:
            up = draw(f"{name}/direction") >= 0.5
            new[name] = changed(dimension, values[name], settings.factors[int(up)], 1 if up else -1)
    return new


def changed(dimension: Dimension, value: Any, factor: float, direction: Literal[1, -1]) -> Any:
    """A value near ``value``: a number times ``factor``, at least one step away; of a choice the neighbour."""
    levels = dimension.levels()
    if dimension.choice is not None and levels is not None:
        place = [identity(level) for level in levels].index(identity(value)) + direction
        return levels[min(max(place, 0), len(levels) - 1)]
    wanted = value * factor
    if levels is not None:
        place = min(range(len(levels)), key=lambda i: (abs(levels[i] - wanted), i))
        if levels[place] == dimension.tidy(value):
            place = min(max(place + (1 if factor >= 1 else -1), 0), len(levels) - 1)
        return levels[place]
    low, high = dimension.bounds
    return min(max(dimension.tidy(wanted), low), high)
