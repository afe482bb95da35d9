"""Cache keys: what decides a member's result, part by part, and why a key was not found, in words.

The rule is one page in ``docs/rules.md`` and the same for every executor. Parts are kept by name beside the result
(the lesson of Flyte: a digest alone cannot tell anybody what changed), the code that implements the stage is a part,
and so is the format version, so that an upgrade is a visible miss and never a silent one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.artifacts import canonical_json, digest_of
from orchestrator.codedigest import code_digests
from orchestrator.graph import Node, derive_seed
from orchestrator.stages.base import STAGES, StageBase
from orchestrator.store import Key, KeyRecord

KEY_FORMAT = "1"
_SHOWN = 3
_LONG = 40

# One arriving artifact: (name of the member that made it, its digest). The name counts, because a stage may show it.
InputDigest = tuple[str, str]


def stage_of(kind: str) -> StageBase[Any]:
    """An instance of the stage class of ``kind`` (SpecError when there is no such kind)."""
    stage: StageBase[Any] = STAGES.load(kind).Stage()
    return stage


def member_seed(node: Node) -> int:
    """The seed of a node's context. Stages over all seeds get one that depends on their names alone."""
    return derive_seed(0, node.seed_name or node.stage, node.member.name) if node.seed is None else node.seed


def keyed_config(config: BaseModel) -> dict[str, Any]:
    """A config as JSON, without the fields marked ``json_schema_extra={"cache": False}`` at any depth."""
    kept: dict[str, Any] = {}
    dumped = config.model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("cache") is False:
            continue
        kept[name] = _keyed(getattr(config, name), dumped[name])
    return kept


def _keyed(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return keyed_config(value)
    if isinstance(value, Mapping) and isinstance(dumped, dict):
        return {name: _keyed(part, dumped[str(name)]) if str(name) in dumped else part for name, part in value.items()}
    if isinstance(value, list | tuple) and isinstance(dumped, list):
        return [_keyed(part, small) for part, small in zip(value, dumped, strict=True)]
    return dumped


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """``{"a": {"b": 1}}`` -> ``{"prefix.a.b": "1"}``, so that a change can be named by its field."""
    if isinstance(value, dict) and value:
        parts: dict[str, str] = {}
        for name in value:
            parts.update(_flat(f"{prefix}.{name}", value[name]))
        return parts
    return {prefix: canonical_json(value).decode()}


def narrowed(node: Node) -> Any:
    """The config of a node as far as its result may depend on it."""
    return stage_of(node.kind).narrow(node.config, node.member)


def code_parts(kind: str, config: Any) -> dict[str, str]:
    """The parts of a key that say which code makes the result of a stage kind with this config."""
    modules = [STAGES.module_name(kind), *stage_of(kind).code(config)]
    return {f"code.{name}": digest for name, digest in code_digests(modules).items()}


def cache_key(
    node: Node,
    input_digests: Mapping[str, Sequence[InputDigest]],
    external: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> Key:
    """The key of a node whose inputs are known.

    Args:
        node: the node; its kind, member, seed, threads and config (``StageBase.narrow``) count, its name only through
            the seed.
        input_digests: port -> (member name, artifact digest), in member order.
        external: digests of what the stage reads from outside the store, see ``StageBase.external``.
        code: result of :func:`code_parts`, when it is known already.
        left_out: port -> members that failed and are tolerated.

    Raises:
        SpecError: unknown stage kind.
        NotFoundError: the stage names a module in ``code()`` that does not exist.
    """
    parts = {
        "format": KEY_FORMAT,
        "kind": node.kind,
        "version": str(STAGES.load(node.kind).Stage.version),
        "seed": str(member_seed(node)),
        "threads": str(node.resources.threads),
    }
    own = narrowed(node)
    parts.update(_flat("config", keyed_config(own)))
    parts.update(_flat("member", dict(node.member.params)))
    for port, arriving in sorted(input_digests.items()):
        parts[f"input.{port}"] = " ".join(f"{member}@{digest}" for member, digest in arriving)
    parts.update({f"left_out.{port}": " ".join(names) for port, names in (left_out or {}).items() if names})
    parts.update({f"external.{name}": digest for name, digest in sorted((external or {}).items())})
    parts.update(code_parts(node.kind, own) if code is None else code)
    return Key(digest_of(canonical_json(parts)), parts)


class KeyMaker:
    """Keys of many nodes of one graph: code and outside files are digested once per stage and narrowed config.

    Args:
        data_root: folder with prepared data sets, handed to ``StageBase.external``.
    """

    def __init__(self, data_root: str | Path) -> None:
        self._data_root = str(data_root)
        self._stages: dict[str, StageBase[Any]] = {}
        self._owned: dict[str, tuple[Any, tuple[str, str]]] = {}
        self._code: dict[tuple[str, str], dict[str, str]] = {}
        self._external: dict[tuple[str, str], Mapping[str, str]] = {}

    def read_code(self, nodes: Iterable[Node]) -> None:
        """Digest the code of all stages now, before any of it is imported: what runs later is checked against this."""
        for node in nodes:
            config, name = self._own(node)
            if name not in self._code:
                self._code[name] = code_parts(node.kind, config)

    def _own(self, node: Node) -> tuple[Any, tuple[str, str]]:
        """The narrowed config of a node, and a name for all nodes with the same one; worked out once."""
        if node.id not in self._owned:
            config = narrowed(node)
            self._owned[node.id] = config, (node.stage, config.model_dump_json())
        return self._owned[node.id]

    def key(
        self,
        node: Node,
        input_digests: Mapping[str, Sequence[InputDigest]],
        left_out: Mapping[str, Sequence[str]] | None = None,
    ) -> Key:
        """See :func:`cache_key`.

        Raises:
            MoepipeError: what the stage reads from outside is missing or damaged.
        """
        self.read_code([node])
        return cache_key(node, input_digests, self.external(node), self._code[self._own(node)[1]], left_out)

    def external(self, node: Node) -> Mapping[str, str]:
        """Digests of what the node reads from outside the store, worked out once per narrowed config.

        Raises:
            MoepipeError: it is missing or damaged.
        """
        config, name = self._own(node)
        if name not in self._external:
            stage = self._stages.setdefault(node.stage, stage_of(node.kind))
            self._external[name] = stage.external(config, self._data_root)
        return self._external[name]


def explain_miss(key: Key, earlier: Iterable[KeyRecord], node: str = "") -> str:
    """Why nothing is stored under ``key``: what differs from the nearest earlier result of the same stage.

    Args:
        key: the key that was not found.
        earlier: records to compare with; those of other stage kinds are ignored.
        node: id of the node; results of the same node are preferred over those of its siblings.
    """
    kind = key.parts.get("kind")
    nearest: tuple[tuple[bool, int], list[str]] | None = None
    for record in earlier:
        if record.parts.get("kind") != kind or record.key == key.digest:
            continue
        changed = [
            name
            for name in sorted({*key.parts, *record.parts}, key=_importance)
            if key.parts.get(name) != record.parts.get(name)
        ]
        # A sibling that differs in what makes it a sibling (seed, member parameters) explains nothing.
        if node and record.node != node and any(name == "seed" or name.startswith("member.") for name in changed):
            continue
        rank = (record.node != node, len(changed))
        if nearest is None or rank < nearest[0]:
            nearest = (rank, [_words(name, record.parts.get(name), key.parts.get(name)) for name in changed])
    if nearest is None:
        return "first time"
    words = list(dict.fromkeys(nearest[1]))
    more = len(words) - _SHOWN
    return "; ".join(words[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _importance(name: str) -> tuple[int, str]:
    order = (
        "format",
        "kind",
        "version",
        "config",
        "member",
        "external",
        "input",
        "left_out",
        "code",
        "threads",
        "seed",
    )
    return order.index(name.partition(".")[0]), name


def _short(value: str) -> str:
    return value if len(value) <= _LONG else f"{value[: _LONG - 1]}…"


def _words(name: str, old: str | None, new: str | None) -> str:
    group, _, rest = name.partition(".")
    if group == "code":
        how = "is new" if old is None else "is no longer used" if new is None else "changed"
        return f"source file {rest} {how}"
    if group == "input":
        return f"input {rest} " + ("is new" if old is None else "is gone" if new is None else "changed")
    if group == "left_out":
        return f"other members of input {rest} failed" if new else f"all members of input {rest} are there"
    if group == "external":
        return f"{rest} " + ("is new" if old is None else "is gone" if new is None else "changed")
    label = {"format": "the cache format", "version": "the stage's version"}.get(name, name)
    if old is None:
        return f"{label} is new ({_short(new or '')})"
    if new is None:
        return f"{label} is gone (was {_short(old)})"
    return f"{label} changed from {_short(old)} to {_short(new)}"
