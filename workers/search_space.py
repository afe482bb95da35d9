"""Search spaces: which values some fields of a config may take, and which of them depend on another choice.

A space maps dotted paths of a config to dimensions. A point of it (``values``) has exactly the paths that are active:
a dimension with ``when`` is active where the choices that it names take one of the values listed there.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import SpecError, nearest

Values = dict[str, Any]
_FORMS = ("choice", "uniform", "loguniform", "integer", "logint")
_DIGITS = 6

# A point may also say with which of its seeds the config is run. Names like this one are no paths of the config.
OWN = "~"
SEED = f"{OWN}seed"


class Dimension(BaseModel):
    """Values of one field: exactly one of choice, uniform, loguniform, int and logint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1, description="one of these values, of any type")
    uniform: tuple[float, float] | None = Field(default=None, description="a number between two, all equally likely")
    loguniform: tuple[float, float] | None = Field(
        default=None, description="a number between two positive ones, every order of magnitude equally likely"
    )
    integer: tuple[int, int] | None = Field(default=None, alias="int", description="a whole number, both ends included")
    logint: tuple[int, int] | None = Field(
        default=None, description="a whole number, every order of magnitude equally likely"
    )
    step: float | None = Field(
        default=None, gt=0, description="of uniform and int: only low, low + step, low + 2 step, ... (quantised)"
    )
    when: dict[str, Any] | None = Field(
        default=None,
        description="path of another choice -> the value (or list of values) under which this dimension exists",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Dimension:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            shown = ", ".join(given).replace("integer", "int") or "none"
            raise ValueError(f"give exactly one of choice, uniform, loguniform, int and logint, found {shown}")
        if self.choice is not None:
            texts = [identity(value) for value in self.choice]
            if len(set(texts)) < len(texts):
                raise ValueError("a choice lists the same value twice")
        else:
            low, high = self.bounds
            if not low < high:
                raise ValueError(f"the first end must be below the second, found {low:g} and {high:g}")
            if low <= 0 and (self.loguniform or self.logint):
                raise ValueError(f"a logarithmic range needs positive ends, found {low:g}")
        if self.step is not None:
            if self.uniform is None and self.integer is None:
                raise ValueError("step belongs to uniform and int only")
            if self.integer is not None and self.step != int(self.step):
                raise ValueError(f"the step of int must be a whole number, found {self.step:g}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Both ends of a range."""
        ends = self.uniform or self.loguniform or self.integer or self.logint
        if ends is None:
            raise SpecError("A choice has no bounds.")
        return ends

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.integer is not None or self.logint is not None

    @property
    def log(self) -> bool:
        """Whether the range is logarithmic."""
        return self.loguniform is not None or self.logint is not None

    def levels(self) -> list[Any] | None:
        """All values, or None when they cannot be listed."""
        if self.choice is not None:
            return list(self.choice)
        if self.uniform is not None and self.step is None:
            return None
        if self.loguniform is not None:
            return None
        low, high = self.bounds
        step = self.step or 1
        return [self.tidy(low + i * step) for i in range(math.floor((high - low) / step + 1e-9) + 1)]

    def probes(self) -> list[Any]:
        """Values whose legality says enough about all: every choice, or both ends of a range."""
        return list(self.choice) if self.choice is not None else [self.tidy(end) for end in self.bounds]

    def tidy(self, value: float) -> Any:
        """A number of a range as it is put into a config: whole, or rounded to six digits."""
        return round(value) if self.whole else float(f"{value:.{_DIGITS}g}")

    def at(self, share: float) -> Any:
        """The value at ``share`` in [0, 1) of the dimension."""
        levels = self.levels()
        if levels is not None and not self.log:
            return levels[min(int(share * len(levels)), len(levels) - 1)]
        low, high = self.bounds
        if not self.log:
            return self.tidy(low + share * (high - low))
        # whole numbers: each is the middle of its cell
        low, high = (low - 0.5, high + 0.5) if self.whole else (low, high)
        value = self.tidy(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
        return min(max(value, self.bounds[0]), self.bounds[1])

    def share(self, value: float) -> float:
        """Where a number of a range lies, 0 .. 1."""
        low, high = (math.log(end) if self.log else end for end in self.bounds)
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def contains(self, value: Any) -> bool:
        """Whether the dimension can take this value."""
        if self.choice is not None:
            return identity(value) in {identity(item) for item in self.choice}
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.bounds
        if not low <= value <= high or (self.whole and value != int(value)):
            return False
        if self.step is None:
            return True
        steps = (value - low) / self.step
        return abs(steps - round(steps)) < 1e-4


def identity(value: Any) -> str:
    """Text that is equal for equal JSON values; 1 and 1.0 are equal."""
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{identity(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(identity(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Flaw:
    """Something wrong with a space: where in it, what, and what to do."""

    path: tuple[str, ...]
    message: str
    hint: str = ""


class Space:
    """Dimensions by path.

    Args:
        dimensions: as written. A space with flaws (:meth:`flaws`) must not be sampled.
    """

    def __init__(self, dimensions: Mapping[str, Dimension]) -> None:
        self.dimensions = dict(dimensions)

    def flaws(self) -> list[Flaw]:
        """Conditions that name no choice of the space, or values that it does not have, or each other."""
        found: list[Flaw] = []
        for name, dimension in self.dimensions.items():
            for other, wanted in (dimension.when or {}).items():
                path = (name, "when", other)
                parent = self.dimensions.get(other)
                if parent is None or other == name:
                    hint = nearest(other, [key for key, d in self.dimensions.items() if d.choice and key != name])
                    found.append(Flaw(path, f"the space has no other dimension {other!r}.", hint))
                elif parent.choice is None:
                    found.append(Flaw(path, f"{other!r} is a range; a condition needs a choice."))
                else:
                    for value in _listed(wanted):
                        if not parent.contains(value):
                            allowed = ", ".join(identity(item) for item in parent.choice)
                            found.append(
                                Flaw(path, f"{other!r} never takes {identity(value)}.", f"Allowed: {allowed}.")
                            )
            for other in self.dimensions:
                if other != name and name.startswith(f"{other}."):
                    found.append(Flaw((name,), f"lies inside {other!r}, which is searched as a whole."))
        if not found and len(self.order()) < len(self.dimensions):
            name = next(key for key in self.dimensions if key not in self.order())
            found.append(Flaw((name, "when"), "the conditions wait for each other in a circle."))
        return found

    def order(self) -> list[str]:
        """Paths so that each comes after those that its condition names."""
        done: list[str] = []
        left = list(self.dimensions)
        while left:
            ready = [name for name in left if all(other in done for other in self.dimensions[name].when or {})]
            if not ready:
                break
            done += ready
            left = [name for name in left if name not in ready]
        return done

    def active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether a dimension exists beside the values of those before it."""
        for other, wanted in (self.dimensions[name].when or {}).items():
            if other not in values or identity(values[other]) not in {identity(item) for item in _listed(wanted)}:
                return False
        return True

    def draw(self, seed: int, number: int) -> Values:
        """Point ``number`` of the random search with this seed.

        Every dimension has draws of its own, so that one more dimension, or more trials, leave the others' as they
        were.
        """
        values: Values = {}
        for name in self.order():
            if self.active(name, values):
                text = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
                share = float(np.random.default_rng(int.from_bytes(text[:16], "big")).random())
                values[name] = self.dimensions[name].at(share)
        return values

    def grid(self) -> Iterator[Values]:
        """All points, the last dimension changing fastest.

        Raises:
            SpecError: a dimension has infinitely many values.
        """
        endless = self.endless()
        if endless:
            raise SpecError(f"A grid needs listed values, but {endless[0]!r} is a range.", "Use a choice or a step.")
        yield from self._below(self.order(), {})

    def _below(self, names: Sequence[str], values: Values) -> Iterator[Values]:
        if not names:
            yield dict(values)
            return
        name, rest = names[0], names[1:]
        if not self.active(name, values):
            yield from self._below(rest, values)
            return
        for level in self.dimensions[name].levels() or ():
            yield from self._below(rest, {**values, name: level})

    def endless(self) -> list[str]:
        """Paths of dimensions whose values cannot be listed."""
        return [name for name, dimension in self.dimensions.items() if dimension.levels() is None]

    def size(self, limit: int = 1_000_000) -> float:
        """Number of points, infinity when there is a range without step or there are more than ``limit``."""
        if self.endless():
            return math.inf
        count = sum(1 for _ in itertools.islice(self.grid(), limit + 1))
        return count if count <= limit else math.inf

    def contains(self, values: Mapping[str, Any]) -> bool:
        """Whether ``values`` is a point of the space: the active paths, each with a value of its dimension."""
        seen: Values = {}
        for name in self.order():
            if self.active(name, seen):
                if name not in values or not self.dimensions[name].contains(values[name]):
                    return False
                seen[name] = values[name]
        return len(seen) == len(values)

    def project(self, config: Mapping[str, Any]) -> Values | None:
        """The point at which ``config`` lies, or None when it is outside or a path is missing in it."""
        values: Values = {}
        for name in self.order():
            if self.active(name, values):
                try:
                    values[name] = get_path(config, name)
                except KeyError:
                    return None
        return values if self.contains(values) else None

    def first(self) -> Values:
        """Some point: first choices and low ends."""
        values: Values = {}
        for name in self.order():
            if self.active(name, values):
                values[name] = self.dimensions[name].probes()[0]
        return values

    def probes(self) -> Iterator[tuple[str, Any, Values]]:
        """``(path, value, point)`` for every value whose legality should be checked, each in one point that has it."""
        for name in self.order():
            base = self._with(name)
            for value in self.dimensions[name].probes():
                point: Values = {}
                for other in self.order():
                    if self.active(other, point):
                        point[other] = value if other == name else base.get(other, self.dimensions[other].probes()[0])
                if name in point:
                    yield name, value, point

    def _with(self, name: str) -> Values:
        """Choices under which ``name`` is active."""
        needed: Values = {}
        for other, wanted in (self.dimensions[name].when or {}).items():
            needed = {**self._with(other), **needed, other: _listed(wanted)[0]}
        return needed


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def point_id(values: Mapping[str, Any]) -> str:
    """Text that is equal for equal points."""
    return ";".join(f"{name}={identity(values[name])}" for name in sorted(values))


def get_path(config: Any, path: str) -> Any:
    """The value at a dotted path (list entries by index); KeyError when there is none."""
    here = config
    for part in path.split("."):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, list | tuple) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        else:
            raise KeyError(path)
    return here


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` with values at dotted paths; maps on the way are made.

    Raises:
        SpecError: a path leads through something that is neither a map nor a list that long.
    """
    new = copy.deepcopy(dict(config))
    for path, value in values.items():
        if path.startswith(OWN):
            continue
        parts = path.split(".")
        here: Any = new
        for part in parts[:-1]:
            key = _key(here, part, path)
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]
        here[_key(here, parts[-1], path)] = copy.deepcopy(value)
    return new


def _key(here: Any, part: str, path: str) -> Any:
    if isinstance(here, dict):
        return part
    if isinstance(here, list) and part.isdigit() and int(part) < len(here):
        return int(part)
    what = f"a list of {len(here)}" if isinstance(here, list) else "a single value"
    raise SpecError(f"The path {path!r} leads through {what}, which has no {part!r}.")
