"""Runs as ``moepipe compare`` reads them: what was made, from what, how long it took; hundreds of them in a second.

Straight from the run record: the specification as plain JSON (it was checked when the run was submitted) and those
events that say what a member made and what it cost. Progress, most of an event file, is skipped unread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from moe.errors import NotFoundError, SpecError, nearest
from orchestrator.runs import LATEST, Run, RunStore
from orchestrator.store import Store
from orchestrator.tracking_state import parse_node

_LAST_EVENT = 1 << 16
_MADE_UP = re.compile(r"(.+)-\d{8}-\d{6}-[0-9a-f]{4}")
_REFERENCE = re.compile(r"\$\{stages\.([A-Za-z][A-Za-z0-9_-]*)")
# The beginning of the lines that are read; members' starts matter only where one failed.
_WANTED = re.compile(rb'\{"time":[0-9.e+]+,"kind":"member-(?:finished|hit|failed|metrics)"')
_WITH_STARTS = re.compile(rb'\{"time":[0-9.e+]+,"kind":"member-(?:started|finished|hit|failed|metrics)"')


@dataclass
class Made:
    """What one member made.

    Attributes:
        digest: of the artifact.
        key: its cache key.
        seconds: time of all attempts in this run; None for a hit, whose time the key's record knows.
        metrics: last value of each recorded metric.
    """

    digest: str = ""
    key: str = ""
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageFacts:
    """A stage as the specification has it: kind, settings, the stages at its ports, resources of a member."""

    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[str, ...]]
    resources: Mapping[str, Any]

    @property
    def devices(self) -> tuple[str, float]:
        """``GPU`` or ``CPU`` and how many of them a member holds, all ranks together."""
        ranks = float(self.resources.get("workers", 1))
        gpus = float(self.resources.get("gpus", 0.0))
        return ("GPU", gpus * ranks) if gpus else ("CPU", float(self.resources.get("cpus", 1.0)) * ranks)


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        id: its id.
        pipeline: name of the pipeline.
        scale: ``smoke``, ``dev`` or ``paper``.
        dataset: the pipeline's data set; may be empty.
        stages: by name, in order.
        made: node id -> what was made.
        ended: its record has an end.
    """

    id: str
    pipeline: str
    scale: str
    dataset: str
    stages: Mapping[str, StageFacts]
    made: Mapping[str, Made]
    ended: bool = True

    def closure(self, stages: Sequence[str]) -> tuple[str, ...]:
        """``stages`` and everything that they are made from, in the pipeline's order."""
        found: set[str] = set()
        waiting = list(stages)
        while waiting:
            name = waiting.pop()
            if name not in found and name in self.stages:
                found.add(name)
                waiting += [source for sources in self.stages[name].inputs.values() for source in sources]
        return tuple(name for name in self.stages if name in found)

    @cached_property
    def _by_stage(self) -> dict[str, list[tuple[int | None, str]]]:
        found: dict[str, list[tuple[int | None, str]]] = {}
        for node in self.made:
            stage, seed, _ = parse_node(node)
            found.setdefault(stage, []).append((seed, node))
        return found

    def of_stage(self, stage: str, seed: int | None) -> Iterator[tuple[str, Made]]:
        """Members of a stage that belong to a seed: its own, and those over all seeds."""
        for own, node in self._by_stage.get(stage, ()):
            if own is None or seed is None or own == seed:
                yield node, self.made[node]


def choose(store: Store, names: Sequence[str], last: int | None, pipeline: str | None) -> list[Run]:
    """The runs that are meant, newest first, each once.

    Args:
        store: where they are.
        names: run ids, unique beginnings, ``last``, or patterns with ``*``; none: see the other two.
        last: the newest so many (of ``pipeline``, when it is given).
        pipeline: only runs of this pipeline.

    Raises:
        NotFoundError: a name means no run, or there is none at all.
        SpecError: names and ``last`` together.
    """
    if names and last is not None:
        raise SpecError("Runs are named, and --last is given too.", "Use one of them.")
    runs = RunStore(store).list()
    if not runs:
        raise NotFoundError(f"There are no runs in {store.url}.", "Start one with moepipe submit.")
    if pipeline is not None:
        own = [run for run in runs if _pipeline(run) == pipeline]
        if not own:
            raise NotFoundError(f"No run is of pipeline {pipeline!r}.", nearest(pipeline, {_pipeline(r) for r in runs}))
        runs = own
    if not names:
        return runs[: last or (len(runs) if pipeline is not None else 1)]
    by_id = {run.id: run for run in runs}
    found = {run.id: run for name in names for run in _matching(name, by_id)}
    return [run for run in runs if run.id in found]


def _matching(name: str, runs: Mapping[str, Run]) -> list[Run]:
    if name in LATEST:
        return [next(iter(runs.values()))]
    if name in runs:
        return [runs[name]]
    pattern = any(letter in name for letter in "*?[")
    found = [run for run_id, run in runs.items() if (fnmatchcase(run_id, name) if pattern else run_id.startswith(name))]
    if not found:
        raise NotFoundError(f"There is no run {name!r}.", nearest(name, [*list(runs)[:20], *LATEST]))
    if len(found) > 1 and not pattern:
        some = ", ".join(run.id for run in found[:5])
        raise NotFoundError(f"{name!r} could be {len(found)} runs: {some}.", f"Write more of it, or '{name}*' for all.")
    return found


def _pipeline(run: Run) -> str:
    # Ids are made of the pipeline's name, date, time and four letters; names may hold dashes themselves.
    if made := _MADE_UP.fullmatch(run.id):
        return made[1]
    return run.pipeline  # `submit --run NAME`


def read_run(run: Run) -> RunFacts:
    """The facts of one run, whether or not it has ended.

    Raises:
        NotFoundError: its record lacks the specification.
    """
    try:
        spec = json.loads((run.path / "spec.json").read_bytes())
        stages = {
            name: StageFacts(
                stage["kind"],
                stage.get("config") or {},
                {port: _references(value) for port, value in (stage.get("inputs") or {}).items()},
                stage.get("resources") or {},
            )
            for name, stage in spec["stages"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotFoundError(f"The record of run {run.id} is damaged: {error}.", "Leave this run out.") from None
    text = _events(run.path / "events.jsonl")
    made, ended = _made(text), b'"kind":"run-finished"' in text[-_LAST_EVENT:]
    return RunFacts(run.id, spec["name"], spec.get("scale", "dev"), spec.get("dataset") or "", stages, made, ended)


def _references(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(name for text in texts for name in _REFERENCE.findall(str(text)))


def _events(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _made(text: bytes) -> dict[str, Made]:
    """Node -> what it made, of the members that succeeded."""
    found: dict[str, Made] = {}
    began: dict[str, float] = {}
    spent: dict[str, float] = {}
    wanted = _WITH_STARTS if b'"kind":"member-failed"' in text else _WANTED
    for line in filter(wanted.match, text.split(b"\n")):
        try:
            event = json.loads(line)
            kind, node, data = event["kind"], event["node"], event["data"]
        except (ValueError, KeyError):
            continue  # torn by a crash
        if kind == "member-started":
            began[node] = event["time"]
            continue
        made = found.setdefault(node, Made())
        if kind == "member-metrics":
            made.metrics.update(data.get("values") or {})
        elif kind == "member-failed":
            spent[node] = spent.get(node, 0.0) + max(0.0, event["time"] - began.get(node, event["time"]))
        else:
            made.digest, made.key = str(data.get("digest", "")), str(data.get("key", ""))
            reused = kind == "member-hit" or data.get("reused")
            made.seconds = None if reused else float(data.get("seconds") or 0.0) + spent.get(node, 0.0)
    return {node: made for node, made in found.items() if made.digest}
