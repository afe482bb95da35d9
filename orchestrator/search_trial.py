"""One trial of a search: the wrapped stage's task at a point of the space, run in whatever process this is.

Plain data and functions, so that it can be sent to any process. A trial may be several runs (``seeds``), one after the
other; the first has exactly the key that an ordinary stage of that config would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from orchestrator.artifacts import quiet_remove
from orchestrator.cache import cache_key, code_parts
from orchestrator.context import CodeChanged, Launcher, run_here, run_member, stop_flag
from orchestrator.executors.base import InputRef, Signal, Task
from orchestrator.nodes import Node, derive_seed
from orchestrator.reporting import Emit
from orchestrator.spec import Retry
from orchestrator.stages.base import STAGES, Member, StageBase, StageConfig
from orchestrator.stages.search import SearchConfig
from orchestrator.store import Key, Store
from workers.search_space import SEED, Values
from workers.segments import FROM, UNTIL

State = Literal["done", "failed", "stopped", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        state: ``stopped``: a scheduler ended it early.
        artifacts: digest of each run that has one, in order.
        error: why it failed.
        curve: ``(update, score)`` of the first run, as far as it was watched.
        steps: updates of a trial that was stopped early.
        reused: all of it was in the store.
        blind: what it reported while the scheduler's curve was not among it; None when the curve was seen.
        code_changed: it failed because the source files are no longer those of the search, so no trial can succeed.
    """

    state: State
    artifacts: tuple[str, ...] = ()
    error: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    steps: int | None = None
    reused: bool = False
    code_changed: bool = False
    blind: Sequence[str] | None = None


@dataclass(frozen=True)
class TrialMaker:
    """Makes tasks out of points.

    Attributes:
        config: of the search.
        task: of the search's own member: inputs, resources, store, places.
    """

    config: SearchConfig
    task: Task
    _code: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def stage(self) -> StageBase[Any]:
        """The wrapped stage."""
        return self.config.wrapped()

    def seed(self, replicate: int) -> int:
        """Seed of a run; the first is that of the ordinary stage."""
        return derive_seed(self.task.seed, "run", str(replicate)) if replicate else self.task.seed

    def member(self, config: StageConfig, values: Values) -> Member:
        """The wrapped stage's member of the search's name; of a segment it says where that ends."""
        found = next(member for member in self.stage.members(config) if member.name == self.task.member)
        if UNTIL not in values:
            return found
        return replace(found, params={**found.params, UNTIL: values[UNTIL]})

    def inputs(self, values: Values) -> dict[str, tuple[InputRef, ...]]:
        """What arrives, and for a segment the one before it."""
        before = {FROM: (InputRef("segment", str(values[FROM])),)} if FROM in values else {}
        return {**self.task.inputs, **before}

    def key(self, values: Values, replicate: int) -> Key:
        """The key of a run, and with ``replicate`` 0 that of the ordinary stage."""
        return self.key_of(self.config.point(values), replicate + int(values.get(SEED, 0)), values)

    def key_of(self, config: StageConfig, replicate: int, values: Values | None = None) -> Key:
        """The key of a run of a config of the wrapped stage; ``values`` may make it a segment."""
        task, values = self.task, values or {}
        member = self.member(config, values)
        own = self.stage.narrow(config, member)
        modules = (STAGES.module_name(self.config.stage.kind), *self.stage.code(own))
        if modules not in self._code:
            self._code[modules] = code_parts(self.config.stage.kind, own)
        node = Node(
            id=task.node,
            stage=task.node.partition("/")[0],
            kind=self.config.stage.kind,
            member=member,
            seed=self.seed(replicate),
            seed_index=None,
            config=config,
            resources=task.resources,
            retry=Retry(),
            timeout_s=None,
            inputs={},
        )
        arriving = self.inputs(values).items()
        digests = {port: tuple((ref.member, ref.digest) for ref in refs) for port, refs in arriving}
        external = self.stage.external(own, task.data_root)
        return cache_key(node, digests, external, self._code[modules], task.left_out)

    def make(self, number: int, values: Values, replicate: int = 0) -> Task:
        """The task of one run.

        Args:
            number: of the trial, for its name and log.
            values: point of the space.
            replicate: which of the ``seeds`` runs.
        """
        config = self.config.point(values)
        member = self.member(config, values)
        suffix = f"/trial={number}" + (f"/run={replicate}" if replicate else "")
        replicate += int(values.get(SEED, 0))
        log = Path(self.task.log).with_suffix("") / f"trial={number}.log"
        return replace(
            self.task,
            node=f"{self.task.node}{suffix}",
            kind=self.config.stage.kind,
            module=STAGES.module_name(self.config.stage.kind),
            config=config.model_dump(mode="json"),
            params=dict(member.params),
            weight=member.weight,
            output=self.stage.output,
            seed=self.seed(replicate),
            key=self.key_of(config, replicate, values),
            inputs=self.inputs(values),
            log=str(log),
            gang=self.stage.gang,
            leads=False,
            slots=1,
        )


def store_of(task: Task) -> Store:
    """The store of a task."""
    return Store.open(task.store, None if "://" not in task.store else Path(task.cache).parent)


def run_trial(
    maker: TrialMaker,
    number: int,
    values: Values,
    emit: Emit,
    launcher: Launcher = run_here,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Run a trial to its artifacts, one run after the other. Never raises but for what ``emit`` raises.

    Args:
        maker: of the search.
        number: of the trial.
        values: its point.
        emit: takes the signals of the wrapped stage.
        launcher: how ``context.train`` runs its function.
        stop: answers whether the search was asked to stop.
    """
    made: list[str] = []
    for replicate in range(maker.config.seeds):
        task = maker.make(number, values, replicate)
        Path(task.log).parent.mkdir(parents=True, exist_ok=True)
        quiet_remove(stop_flag(store_of(task), task.key.digest))
        signal: Signal = run_member(task, emit, launcher, stop)
        if signal.kind != "finished":
            if signal.cause in ("infrastructure", "preemption", "out_of_memory"):
                return Outcome("failed", tuple(made), f"{signal.cause}: {signal.error}")
            state: State = "interrupted" if signal.cause == "interrupted" else "failed"
            error = signal.error.message if signal.error else "it failed"
            return Outcome(state, tuple(made), error, code_changed=isinstance(signal.error, CodeChanged))
        made.append(str(signal.data["digest"]))
    return Outcome("done", tuple(made))


def found(maker: TrialMaker, store: Store, values: Values) -> Outcome | None:
    """The trial from the store, when all of its runs are there."""
    digests = []
    for replicate in range(maker.config.seeds):
        artifact = store.lookup(maker.key(values, replicate))
        if artifact is None:
            return None
        digests.append(artifact.digest)
    return Outcome("done", tuple(digests))


def known_points(maker: TrialMaker, store: Store) -> list[Values]:
    """Points of the space at which the wrapped stage has been run with these inputs and this seed, by key."""
    space = maker.config.searched()
    names = list(space.dimensions)
    base = maker.key_of(maker.config.some(), 0).parts
    fixed = {name: base[name] for name in base if name in ("kind", "version", "seed", "threads", "format")}
    fixed |= {name: base[name] for name in base if name.startswith(("input.", "left_out."))}
    points: dict[str, Values] = {}
    for record in store.records():
        if any(record.parts.get(name) != value for name, value in fixed.items()):
            continue
        config = _nested(record.parts)
        values = space.project(config)
        if values is None or set(values) - set(names):
            continue
        if maker.key(values, 0).digest == record.key and store.lookup(record.key) is not None:
            points[record.key] = values
    return [points[key] for key in sorted(points)]


def _nested(parts: Mapping[str, str]) -> dict[str, Any]:
    """The config out of a key's parts."""
    config: dict[str, Any] = {}
    for name, text in parts.items():
        if name.startswith("config."):
            here = config
            path = name.split(".")[1:]
            for part in path[:-1]:
                below = here.setdefault(part, {})
                if not isinstance(below, dict):
                    break
                here = below
            else:
                here[path[-1]] = json.loads(text)
    return config
