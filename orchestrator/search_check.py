"""What is wrong with a search, before anything runs: the wrapped config, every edge of the space, the metric.

Every choice and both ends of every range are put into the wrapped stage's config and checked by its own model, so a
trial cannot fail later because of a name or a bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from moe.errors import MoepipeError
from orchestrator.positions import Place, Problem, Tree
from orchestrator.stages.base import STAGES, StageBase
from orchestrator.stages.search import SearchConfig
from orchestrator.validation import validate
from workers.search_space import Space, get_path, identity, with_values

Finding = tuple[tuple[str | int, ...], str, str]
_FOREIGN = frozenset({"test", "tests", "oracle", "target", "unseen", "heldout", "out"})
_SPLITS = re.compile(r"^(.*_)?splits?$")


def problems(config: SearchConfig) -> list[Finding]:
    """``(path in the config block, message, hint)`` of everything that is wrong."""
    try:
        stage = config.wrapped()
    except MoepipeError as error:
        return [(("stage", "kind"), error.message, error.hint)]
    space = config.searched()
    flaws: list[Finding] = [(("space", *flaw.path), flaw.message, flaw.hint) for flaw in space.flaws()]
    if flaws:
        return flaws
    found = list(_config_findings(config, stage, space))
    if not found:
        found = [*_members_findings(config, stage, space), *_grid_findings(config, space)]
    if config.lanes:
        found += _segment_findings(config, stage)
    return [*found, *selection_findings(config)]


def _read(model: type[BaseModel], raw: Mapping[str, Any]) -> list[Problem]:
    return validate(model, Tree.of(dict(raw), Place("")))[1]


def _config_findings(config: SearchConfig, stage: StageBase[Any], space: Space) -> Iterator[Finding]:
    model: type[BaseModel] = stage.Config
    try:
        base = _read(model, with_values(config.stage.config, space.first()))
    except MoepipeError as error:
        yield ("space",), error.message, error.hint
        return
    told = {(problem.path, problem.message) for problem in base}
    for problem in base:
        if not any(_related(problem.path, name) for name in space.dimensions):
            yield ("stage", "config", *_parts(problem.path)), problem.message, problem.hint
    for name, value, point in space.probes():
        try:
            seen = _read(model, with_values(config.stage.config, point))
        except MoepipeError as error:
            yield ("space", name), error.message, error.hint
            continue
        for problem in seen:
            key = (problem.path, problem.message)
            if key in told and not _related(problem.path, name):
                continue
            told.add(key)
            unknown = problem.message == "is not a known key."
            text = (
                f"{stage_words(config)} has no field {problem.path!r}."
                if unknown
                else f"the value {identity(value)}: {problem.message}"
            )
            yield ("space", name), text, problem.hint
            break


def stage_words(config: SearchConfig) -> str:
    """How messages call the wrapped stage's config."""
    return f"the config of stage kind {config.stage.kind!r}"


def _related(path: str, name: str) -> bool:
    """Whether a problem's path is a dimension's, above it or inside it."""
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.")


def _parts(path: str) -> tuple[str | int, ...]:
    names = [part for part in re.sub(r"\[(\d+)\]", r".\1", path).split(".") if part]
    return tuple(int(part) if part.isdigit() else part for part in names)


def _members_findings(config: SearchConfig, stage: StageBase[Any], space: Space) -> Iterator[Finding]:
    """The fan-out must be the same at every point: its members are the search's."""
    try:
        names = [member.name for member in stage.members(config.some())]
    except (MoepipeError, ValueError) as error:
        yield ("stage", "config"), str(error), ""
        return
    for name, value, point in space.probes():
        theirs = [member.name for member in stage.members(config.point(point))]
        if theirs != names:
            text = f"the value {identity(value)} makes {len(theirs)} members, the config as written {len(names)}."
            yield ("space", name), text, "Search over fields that leave the fan-out as it is."
            return


def _grid_findings(config: SearchConfig, space: Space) -> Iterator[Finding]:
    if config.algorithm != "grid":
        return
    for name in space.endless():
        yield ("space", name), "a grid needs listed values, and this is a range.", "Use choice, int, or a step."


def _segment_findings(config: SearchConfig, stage: StageBase[Any]) -> Iterator[Finding]:
    """Only what a stage says may change while it trains can be a dimension of a population, or part of a schedule."""
    kind, allowed = config.stage.kind, stage.changeable
    if not allowed:
        able = [name for name in STAGES.names() if STAGES.load(name).Stage.changeable]
        text = f"stage kind {kind!r} cannot go on from the training state of another trial."
        yield ("algorithm",), text, f"Stage kinds that can: {', '.join(able)}."
        return
    places: list[tuple[tuple[str | int, ...], str]] = [(("space", name), name) for name in config.space]
    for number, change in enumerate(config.schedule):
        places += [(("schedule", number, "values", name), name) for name in change.values]
    for place, name in places:
        if name not in allowed:
            text = f"{name!r} cannot change while training goes on."
            yield place, text, f"Fields of {kind!r} that can: {', '.join(allowed)}."
    for number, change in enumerate(config.schedule):
        try:
            seen = _read(stage.Config, with_values(config.stage.config, change.values))
        except MoepipeError as error:
            yield ("schedule", number, "values"), error.message, error.hint
            continue
        for problem in seen[:1]:
            yield ("schedule", number, "values"), f"{problem.path}: {problem.message}", problem.hint


def selection_findings(config: SearchConfig) -> Iterator[Finding]:
    """A metric of the test domains chooses what it is then used to judge."""
    why = "Selection never looks at test domains: name a metric of validation rows."
    for metric in config.metrics:
        words = set(re.split(r"[^a-z0-9]+", metric.lower()))
        if words & _FOREIGN or "held_out" in metric.lower():
            yield ("metric",), f"{metric!r} is a metric of test domains.", why
    for path, value in [*_splits(config.some_or_none()), *_space_splits(config)]:
        if value == "test" or value.startswith(("test_", "oracle")):
            text = f"{stage_words(config)} reads the split {value!r} at {path}, so its metrics are of test domains."
            yield ("stage", "config"), text, f"Set {path} to a validation split."


def _splits(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Fields that name splits, with the names."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        for name, child in value.items():
            here = f"{path}.{name}" if path else str(name)
            if _SPLITS.match(str(name)) and isinstance(child, str):
                yield here, child
            elif _SPLITS.match(str(name)) and isinstance(child, list):
                yield from ((here, item) for item in child if isinstance(item, str))
            else:
                yield from _splits(child, here)


def _space_splits(config: SearchConfig) -> Iterator[tuple[str, str]]:
    for _, _, point in config.searched().probes():
        yield from _splits(with_values({}, {name: value for name, value in point.items() if "." not in name}))
        for name, value in point.items():
            if _SPLITS.match(name.rpartition(".")[2]) and isinstance(value, str):
                yield name, value


_TRIED_BY: Mapping[str, tuple[str, ...]] = {
    "batch": ("tpe",),
    "startup": ("tpe",),
    "reuse": ("random", "tpe"),
    "include_written": ("random", "tpe", "population"),
    "sampler_seed": ("random", "tpe", "population"),
}
_STOPPED_BY: Mapping[str, tuple[str, ...]] = {
    "curve": ("asha", "median"),
    "grace": ("asha", "median"),
    "reduction": ("asha",),
}


def idle_settings(config: SearchConfig) -> Iterator[tuple[str, str]]:
    """``(field, message)`` for settings that algorithm or scheduler never look at."""
    for what, chosen, users in (
        ("algorithm", config.algorithm, _TRIED_BY),
        ("scheduler", config.scheduler, _STOPPED_BY),
    ):
        for name, able in users.items():
            if chosen not in able and getattr(config, name) != SearchConfig.model_fields[name].default:
                yield name, f"has no effect with {what} {chosen}; it is of {' and '.join(able)}."


def metric_value(meta: Mapping[str, Any], metric: str) -> float | None:
    """The number at a path of an artifact's meta; keys that contain dots are found as well. None: there is none."""
    for name, value in numbers(meta):
        if name == metric:
            return value
    try:
        value = get_path(meta, metric)
    except KeyError:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers(meta: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a meta record, by dotted path."""
    for name, value in meta.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from numbers(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, float(value)
