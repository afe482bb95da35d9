"""What a submit would do: hit or miss per member with the reason in words, time, bytes, critical path, feasibility."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from moe.errors import MoepipeError
from orchestrator.cache import KeyMaker, explain_miss
from orchestrator.capacity import Capacity, infeasible, misfit, rank_demand
from orchestrator.graph import Graph, Node
from orchestrator.runs import RunStore
from orchestrator.store import KeyRecord, Store

State = Literal["hit", "miss", "blocked"]


@dataclass(frozen=True)
class PlanEntry:
    """What would happen to one node.

    Attributes:
        node: id.
        stage: stage name; ``kind`` its kind.
        state: ``hit``: there already; ``miss``: would run; ``blocked``: would run once what it waits for is made, or
            cannot run because something is missing outside (``reason`` says which).
        reason: in words; empty for a hit.
        key: cache key, when the inputs are known.
        artifact: digest, of a hit.
        resources: amounts per rank, with ``workers`` when there are several ranks.
        estimate_s: seconds that members like it took before; None when there are none; 0 for a hit.
        bytes: size of the artifact (of a hit), or as members like it made before.
    """

    node: str
    stage: str
    kind: str
    state: State
    reason: str
    key: str | None = None
    artifact: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    estimate_s: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """The answer of :func:`make_plan`.

    Attributes:
        entries: by node id, in topological order.
        critical_path: node ids of the longest chain of work to do.
        critical_s: its seconds as far as they are known.
        total_s: seconds of all work to do, as far as they are known.
        unknown: how many members to run have no estimate.
        new_bytes: bytes that would be written, as far as they are known.
        problems: what makes it impossible, in words.
        infeasible: what does not fit the capacity, in words.
        missing: the errors behind ``problems``: data, weights or packages that stages need and that are not there.
    """

    entries: Mapping[str, PlanEntry]
    critical_path: tuple[str, ...]
    critical_s: float
    total_s: float
    unknown: int
    new_bytes: int
    problems: tuple[str, ...] = ()
    infeasible: tuple[str, ...] = ()
    missing: tuple[MoepipeError, ...] = field(default=(), repr=False)

    @property
    def feasible(self) -> bool:
        """Whether every node that would run fits the capacity."""
        return not self.infeasible

    def count(self, state: State) -> int:
        """Nodes in a state."""
        return sum(entry.state == state for entry in self.entries.values())

    def require_feasible(self) -> None:
        """Raise InfeasibleError naming the first node that does not fit."""
        if self.infeasible:
            raise infeasible(self.infeasible)

    def require_sources(self) -> None:
        """Raise the error of the first stage that would not find its data or weights, before any other one works."""
        if not self.missing:
            return
        first = self.missing[0]
        more = [error.message for error in self.missing[1:]]
        also = f" Also: {' '.join(more)}" if more else ""
        raise type(first)(f"Nothing was started. {first.message}{also}", first.hint)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for ``--json`` and the run record."""
        record = asdict(replace(self, missing=()))
        del record["missing"]
        record["entries"] = [asdict(entry) for entry in self.entries.values()]
        record["feasible"] = self.feasible
        record["counts"] = {state: self.count(state) for state in ("hit", "miss", "blocked")}
        return record


class _History:
    """Earlier results by stage kind, for reasons and estimates."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self._by_kind: dict[str, list[KeyRecord]] = {}
        for record in records:
            self._by_kind.setdefault(record.parts.get("kind", ""), []).append(record)

    def of(self, kind: str) -> list[KeyRecord]:
        return self._by_kind.get(kind, [])

    def like(self, node: Node, config: Mapping[str, str]) -> list[KeyRecord]:
        """Those of the kind whose config differs in the fewest fields."""
        best: list[KeyRecord] = []
        fewest: int | None = None
        for record in self.of(node.kind):
            theirs = {name: value for name, value in record.parts.items() if name.startswith("config")}
            differ = sum(theirs.get(name) != config.get(name) for name in {*theirs, *config})
            if fewest is None or differ < fewest:
                best, fewest = [], differ
            if differ == fewest:
                best.append(record)
        return best


def make_plan(
    graph: Graph,
    store: Store,
    runs: RunStore | None = None,
    data_root: str | Path = "",
    capacity: Capacity | None = None,
) -> Plan:
    """Work out what a submit would do, without starting anything.

    Args:
        graph: the expanded pipeline.
        store: where results are looked up; its key records carry the times of earlier members.
        runs: not needed for the answer; accepted so that callers may pass both halves of a store.
        data_root: folder with prepared data sets.
        capacity: what there is; None: feasibility is not judged.
    """
    keys = KeyMaker(data_root)
    history = _History(store.records())
    entries: dict[str, PlanEntry] = {}
    problems: dict[str, MoepipeError] = {}
    for node in graph.nodes.values():
        entries[node.id] = _entry(node, entries, graph, store, keys, history, problems)
    work = {name: entry for name, entry in entries.items() if entry.state != "hit"}
    path, seconds = _critical_path(graph, work)
    infeasible: list[str] = []
    if capacity is not None:
        by_shape: dict[str, str] = {}
        for name in work:
            resources = graph.nodes[name].resources
            shape = resources.model_dump_json()
            if shape not in by_shape:
                by_shape[shape] = misfit(name, resources, capacity)
                infeasible += [by_shape[shape]] if by_shape[shape] else []
    return Plan(
        entries=entries,
        critical_path=path,
        critical_s=round(seconds, 3),
        total_s=round(sum(entry.estimate_s or 0.0 for entry in work.values()), 3),
        unknown=sum(entry.estimate_s is None for entry in work.values()),
        new_bytes=sum(entry.bytes or 0 for entry in work.values()),
        problems=tuple(problems),
        infeasible=tuple(infeasible),
        missing=tuple(problems.values()),
    )


def _entry(
    node: Node,
    entries: Mapping[str, PlanEntry],
    graph: Graph,
    store: Store,
    keys: KeyMaker,
    history: _History,
    problems: dict[str, MoepipeError],
) -> PlanEntry:
    waits = [parent for parent in node.parents if entries[parent].state != "hit"]
    if waits:
        try:
            keys.external(node)
        except MoepipeError as error:
            problems[str(error)] = error
        more = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
        return _blocked(node, f"waits for {waits[0]}{more}, which will be rebuilt", history)
    digests = {
        port: tuple((graph.nodes[parent].name, entries[parent].artifact or "") for parent in parents)
        for port, parents in node.inputs.items()
    }
    try:
        key = keys.key(node, digests)
    except MoepipeError as error:  # a data set that is not there, say
        problems[str(error)] = error
        return _blocked(node, error.message, history)
    found = store.examine(key)
    resources = _resources(node)
    if found.artifact is not None:
        return PlanEntry(
            node.id,
            node.stage,
            node.kind,
            "hit",
            "",
            key.digest,
            found.artifact.digest,
            resources,
            0.0,
            found.artifact.bytes,
        )
    config = {name: value for name, value in key.parts.items() if name.startswith("config")}
    like = history.like(node, config)
    reason = found.reason or explain_miss(key, history.of(node.kind), node.id)
    estimate, size = _usual(like)
    return PlanEntry(node.id, node.stage, node.kind, "miss", reason, key.digest, None, resources, estimate, size)


def _blocked(node: Node, reason: str, history: _History) -> PlanEntry:
    estimate, size = _usual(
        [record for record in history.of(node.kind) if record.node == node.id] or history.of(node.kind)
    )
    return PlanEntry(node.id, node.stage, node.kind, "blocked", reason, None, None, _resources(node), estimate, size)


def _usual(records: list[KeyRecord]) -> tuple[float | None, int | None]:
    """Median seconds and bytes of earlier results."""
    if not records:
        return None, None
    return float(median(record.seconds for record in records)), int(median(record.bytes for record in records))


def _resources(node: Node) -> dict[str, float]:
    amounts = rank_demand(node.resources)
    return amounts if node.resources.workers == 1 else {**amounts, "workers": float(node.resources.workers)}


def _critical_path(graph: Graph, work: Mapping[str, PlanEntry]) -> tuple[tuple[str, ...], float]:
    """Longest chain of the work to do; a member without estimate counts as an instant, but it counts."""
    instant = 1e-6
    best: dict[str, tuple[float, str | None]] = {}
    for name in reversed(list(graph.nodes)):
        if name in work:
            after = [(best[child][0], child) for child in graph.children[name] if child in best]
            longest = max(after, default=(0.0, None), key=lambda item: item[0])
            best[name] = (longest[0] + (work[name].estimate_s or 0.0) + instant, longest[1])
    if not best:
        return (), 0.0
    name = max(best, key=lambda candidate: best[candidate][0])
    seconds, path, at = best[name][0], [], name
    step: str | None = at
    while step is not None:
        path.append(step)
        step = best[step][1]
    return tuple(path), max(0.0, seconds - instant * len(path))
