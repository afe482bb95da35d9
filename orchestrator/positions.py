"""Values that remember where they were written, and problems that say so.

A YAML becomes a :class:`Tree`: plain scalars, dicts and lists in which every value carries its :class:`Place`. Merging,
``--set`` and references work on trees, so a message can always name the file, line and column that a person must edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from moe.errors import SpecError

Path: TypeAlias = tuple[str | int, ...]
MAX_NODES = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written. ``line`` and ``column`` count from 1; 0 when the source has none (``--set``)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class EnvText(str):
    """Text of an environment variable: may stand for a number where one is expected; never shown in messages."""

    __slots__ = ()


@dataclass(slots=True)
class Tree:
    """A value with its place.

    Attributes:
        value: scalar, ``dict[str, Tree]`` or ``list[Tree]``.
        place: where the value is written.
        key: where its key is written (maps), else as ``place``.
        via: the reference that put it there, e.g. ``${params.lr}``.
        broken: already reported (a reference that failed); checks of its value stay silent.
    """

    value: Any
    place: Place
    key: Place
    via: str = ""
    broken: bool = False

    @classmethod
    def of(cls, value: Any, place: Place) -> Tree:
        """A tree of plain values that all stand at one place."""
        if isinstance(value, dict):
            value = {name: cls.of(child, place) for name, child in value.items()}
        elif isinstance(value, list | tuple):
            value = [cls.of(child, place) for child in value]
        return cls(value, place, place)

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, part: str | int) -> Tree | None:
        """The child at a key or index, or None."""
        if isinstance(self.value, dict):
            found = self.value.get(part)
            return found if isinstance(found, Tree) else None
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            item: Tree = self.value[part]
            return item
        return None

    def find(self, path: Path) -> tuple[Tree, Path]:
        """The deepest tree on the way to ``path``, and the part of the path that does not exist.

        Parts that name no child are left out when a later one does (pydantic puts the names of union branches
        into its locations).
        """
        here, missing = self, []
        for part in path:
            below = here.child(part)
            if below is None:
                missing.append(part)
            else:
                here, missing = below, []
        return here, tuple(missing)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a pipeline.

    Attributes:
        place: where to look.
        path: dotted field path, e.g. ``stages.distill.config.inner_lr``; empty for the whole file.
        message: what was found and what was expected.
        hint: nearest valid name, or what to do.
        severity: ``error`` or ``warning``.
    """

    place: Place
    path: str
    message: str
    hint: str = ""
    severity: str = "error"

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.place}: {where}{self.message}{' ' + self.hint if self.hint else ''}"

    def to_json(self) -> dict[str, Any]:
        """JSON form for ``moepipe validate --json``."""
        return {
            "file": self.place.source,
            "line": self.place.line or None,
            "column": self.place.column or None,
            "path": self.path,
            "message": self.message,
            "hint": self.hint,
            "severity": self.severity,
        }


@dataclass(frozen=True, slots=True)
class LintProblem:
    """A problem of the graph, by field path; loading adds the place.

    Attributes:
        rule: stable name of the rule, e.g. ``cycle``.
        path: as in :class:`Problem`, by parts.
        message: what is wrong.
        hint: what to do.
        severity: ``error`` or ``warning``.
    """

    rule: str
    path: Path
    message: str
    hint: str = ""
    severity: str = "error"

    def at(self, tree: Tree) -> Problem:
        """The same with the place that ``tree`` knows for the path."""
        here, missing = tree.find(self.path)
        place = here.key if missing or isinstance(here.value, dict | list) else here.place
        return Problem(place, dotted(self.path), self.message, self.hint, self.severity)

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}{' ' + self.hint if self.hint else ''}"


class SpecErrors(SpecError):
    """Everything that is wrong with a pipeline, at once.

    Attributes:
        problems: in the order of the file.
    """

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems: tuple[Problem, ...] = _ordered(problems)
        count = len(self.problems)
        head = f"{source} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))


def _ordered(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Files in the order they came up, each from top to bottom; then command-line arguments by number."""
    unique = dict.fromkeys(problems)
    rank = {source: index for index, source in enumerate(dict.fromkeys(problem.place.source for problem in unique))}

    def order(problem: Problem) -> tuple[int, str, int, int]:
        source = problem.place.source
        argument = source.startswith("--")
        return 1000 + len(source) if argument else rank[source], source, problem.place.line, problem.place.column

    return tuple(sorted(unique, key=order))


def dotted(path: Sequence[str | int]) -> str:
    """``("stages", "a", "seeds", 0)`` as ``stages.a.seeds[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def found(value: Any) -> str:
    """How a message shows a value that was read: short, in YAML's words, and without secrets."""
    if isinstance(value, EnvText):
        return "the text of the environment variable"
    if isinstance(value, dict):
        return f"a map with {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "...'"


@dataclass(slots=True)
class Budget:
    """Counts the nodes that aliases and references make, so that a small file cannot blow up memory."""

    left: int = MAX_NODES

    def take(self) -> bool:
        """False when the limit is passed."""
        self.left -= 1
        return self.left >= 0
