"""Where an artifact comes from: ``moepipe show RUN --why``, back to the digests of the data.

The key record of every member holds all that decided its result, part by part: settings, arriving artifacts, files from
outside, and a digest of every source file. The tree is read from these records, so it is what really happened and not
what the pipeline says now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.errors import NotFoundError, nearest
from orchestrator.artifacts import canonical_json, digest_of
from orchestrator.compare_read import RunFacts, read_run
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.tracking_state import parse_node

_SHOWN_CONFIG = 4
_SHOWN_SIBLINGS = 3
_LONG = 40
_EMPTY = ("null", "{}", "[]", '""', "false")
_DATA_FIELDS = ("dataset", "digest", "rows")


@dataclass(frozen=True)
class Origin:
    """One member and what decided its artifact.

    Attributes:
        node, stage, kind: which member.
        digest: of its artifact.
        key: its cache key.
        state: ``made`` in this run, or ``hit``.
        reason: why it was made, as the plan said.
        seconds: that its making took; None when unknown.
        config: the settings in the key.
        code: one digest over all source files; ``files`` of them.
        external: digests of what it read from outside the store.
        data: of a data artifact: name, digest and rows by split.
        inputs: port -> nodes.
    """

    node: str
    stage: str
    kind: str
    digest: str
    key: str
    state: str
    reason: str
    seconds: float | None
    config: Mapping[str, str]
    code: str
    files: int
    external: Mapping[str, str]
    data: Mapping[str, Any]
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Lineage:
    """The origins of one run's artifacts.

    Args:
        run: the run.
        store: where key records and artifacts are.
    """

    def __init__(self, run: Run, store: Store) -> None:
        self._store = store
        self._facts: RunFacts = read_run(run)
        plan = (run.plan() or {}).get("entries") or []
        self._reasons = {str(entry["node"]): str(entry.get("reason") or "") for entry in plan}
        self._nodes: dict[str, list[str]] = {}
        for node, made in self._facts.made.items():
            self._nodes.setdefault(made.digest, []).append(node)
        self._known: dict[str, Origin] = {}

    def roots(self, what: str | None) -> list[str]:
        """Members of a stage, one member, or (None) of the stages whose results no other stage takes.

        Raises:
            NotFoundError: there is none of that name, or it made nothing.
        """
        made = self._facts.made
        if what in made:
            return [str(what)]
        stages = {node: parse_node(node)[0] for node in made}
        if not made:
            raise NotFoundError(f"Run {self._facts.id} has made nothing yet.", "moepipe status says how far it is.")
        if what is None:
            every = self._facts.stages.values()
            used = {name for stage in every for sources in stage.inputs.values() for name in sources}
            return [node for node, stage in stages.items() if stage not in used] or list(made)[-1:]
        found = [node for node, stage in stages.items() if stage == what or node.startswith(f"{what}/")]
        if not found:
            names = [*dict.fromkeys(stages.values()), *made]
            raise NotFoundError(f"Nothing was made by {what!r} in run {self._facts.id}.", nearest(what, names[:60]))
        return found

    def origin(self, node: str) -> Origin:
        """What decided one member's artifact."""
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def walk(self, roots: Sequence[str]) -> dict[str, Origin]:
        """The origins of ``roots`` and of all that they are made from."""
        found: dict[str, Origin] = {}
        waiting = list(roots)[::-1]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found[node] = self.origin(node)
                waiting += [name for names in found[node].inputs.values() for name in names][::-1]
        return found

    def _read(self, node: str) -> Origin:
        made = self._facts.made[node]
        stage = parse_node(node)[0]
        kind = self._facts.stages[stage].kind if stage in self._facts.stages else ""
        record = self._store.record(made.key) if made.key else None
        parts = dict(record.parts) if record else {}
        code = {name: value for name, value in parts.items() if name.startswith("code.")}
        state = "made" if made.seconds is not None else "hit"
        return Origin(
            node=node,
            stage=stage,
            kind=kind,
            digest=made.digest,
            key=made.key,
            state=state,
            reason=self._reasons.get(node, ""),
            seconds=made.seconds if made.seconds is not None else (record.seconds if record else None),
            config={name[7:]: value for name, value in parts.items() if name.startswith("config.")},
            code=digest_of(canonical_json(code)) if code else "",
            files=len(code),
            external={name[9:]: value for name, value in parts.items() if name.startswith("external.")},
            data=self._data(made.digest) if kind in ("prepare", "text_prepare") else {},
            inputs={
                name[6:]: self._senders(name[6:], value, stage)
                for name, value in parts.items()
                if name.startswith("input.")
            },
        )

    def _data(self, digest: str) -> dict[str, Any]:
        try:
            meta = self._store.artifact(digest).meta
        except NotFoundError:
            return {}
        return {name: meta[name] for name in _DATA_FIELDS if name in meta}

    def _senders(self, port: str, arriving: str, stage: str) -> tuple[str, ...]:
        """Nodes behind ``member@digest member@digest ...``, of the stages that are wired to the port."""
        wired = self._facts.stages[stage].inputs.get(port, ()) if stage in self._facts.stages else ()
        found = []
        for part in arriving.split():
            member, _, digest = part.rpartition("@")
            names = self._nodes.get(digest, [])
            of_stage = [name for name in names if parse_node(name)[0] in wired]
            same = [name for name in of_stage if name.partition("/")[2] == member]
            found += (same or of_stage or names)[:1]
        return tuple(found)


def to_json(lineage: Lineage, run: str, roots: Sequence[str]) -> dict[str, Any]:
    """The document of ``show --why --json``."""
    return {"run": run, "roots": list(roots), "nodes": {k: vars(v) for k, v in lineage.walk(roots).items()}}


def tree(lineage: Lineage, roots: Sequence[str]) -> Iterator[str]:
    """Lines for people. What stands above already is not repeated; of many alike the first few are shown."""
    told: set[str] = set()
    for number, node in enumerate(roots):
        if number == _SHOWN_SIBLINGS:
            yield f"... and {len(roots) - number} more members of the stage, made alike"
            return
        yield from _branch(lineage, node, "", "", told)


def _branch(lineage: Lineage, node: str, head: str, indent: str, told: set[str]) -> Iterator[str]:
    origin = lineage.origin(node)
    if node in told:
        yield f"{head}{node}  {origin.digest[:12]}  (as above)"
        return
    told.add(node)
    yield f"{head}{node}  {origin.digest[:12]}  {_made(origin)}"
    children = [(port, name) for port, names in origin.inputs.items() for name in _few(names)]
    rest = {
        port: len(names) - len(_few(names)) for port, names in origin.inputs.items() if len(names) > len(_few(names))
    }
    stem = indent + ("│  " if children else "   ")
    for line in _details(origin):
        yield f"{stem}{line}"
    for number, (port, name) in enumerate(children):
        last = number == len(children) - 1
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield from _branch(lineage, name, f"{indent}{branch}{port}: ", indent + below, told)
        if port in rest and (last or children[number + 1][0] != port):
            yield f"{indent}{below}... and {rest[port]} more at the port {port}, made alike"


def _few(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) <= _SHOWN_SIBLINGS else names[:1]


def _made(origin: Origin) -> str:
    took = "" if origin.seconds is None else f" in {origin.seconds:.1f} s"
    reason = f": {origin.reason}" if origin.reason and origin.state == "made" else ""
    return f"hit, first made{took}" if origin.state == "hit" else f"made{took}{reason}"


def _details(origin: Origin) -> Iterator[str]:
    if origin.config:
        told = [(name, value) for name, value in origin.config.items() if value not in _EMPTY]
        shown = [f"{name}={value if len(value) <= _LONG else value[:_LONG] + '...'}" for name, value in told]
        more = len(origin.config) - len(shown[:_SHOWN_CONFIG])
        yield f"config  {', '.join(shown[:_SHOWN_CONFIG])}{f' and {more} more' if more > 0 else ''}"
    if origin.code:
        yield f"code    {origin.code[:12]} over {origin.files} source files"
    for name, digest in origin.external.items():
        yield f"outside {name} {digest[:12]}"
    if origin.data:
        rows = ", ".join(f"{split} {count}" for split, count in (origin.data.get("rows") or {}).items())
        yield f"data    {origin.data.get('dataset', '')} {str(origin.data.get('digest', ''))[:12]} ({rows})"
    if not origin.code:
        yield "the record of its key is gone: settings and code are unknown"
