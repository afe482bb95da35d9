"""YAML text -> :class:`~orchestrator.positions.Tree`, with positions and without surprises.

ruamel.yaml composes (YAML 1.2: ``no`` is text, ``3e-4`` a number); the values are built here: only maps, lists, text,
numbers, booleans and null. Tags, duplicate keys, recursion and aliases that multiply are refused.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from moe.errors import NotFoundError
from orchestrator.positions import MAX_NODES, Budget, Place, Problem, SpecErrors, Tree

MAX_BYTES = 1_000_000
MAX_DEPTH = 60
_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + name for name in ("str", "timestamp", "value")}


def read_file(path: Path) -> Tree:
    """Read a pipeline file.

    Raises:
        NotFoundError: there is no such file.
        SpecErrors: it is a directory, unreadable, too large, not UTF-8, not YAML, empty, or not a map.
    """
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"There is no pipeline file {source!r}.", "`moepipe init` writes one to start from."
        ) from None
    except IsADirectoryError:
        raise _refuse(source, "is a directory; a pipeline is one YAML file.", _yaml_files(path)) from None
    except OSError as error:
        raise _refuse(source, f"cannot be read: {error.strerror or error}.") from None
    if len(data) > MAX_BYTES:
        raise _refuse(source, f"is larger than {MAX_BYTES // 1000} kB; a pipeline file holds settings, not data.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8 text."
        raise SpecErrors(source, [Problem(Place(source, line, column), "", message, "Save it as UTF-8.")]) from None
    return read_text(text, source)


def _yaml_files(folder: Path) -> str:
    names = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))[:5]
    return f"It contains: {', '.join(names)}." if names else ""


def _refuse(source: str, message: str, hint: str = "", place: Place | None = None) -> SpecErrors:
    return SpecErrors(source, [Problem(place or Place(source), "", f"the file {message}", hint)])


def read_text(text: str, source: str) -> Tree:
    """Read YAML text whose top is a map (raises SpecErrors, see :func:`read_file`)."""
    root = _compose(text, source)
    if root is None:
        raise _refuse(source, "is empty.", "`moepipe init` writes one to start from.")
    if not isinstance(root, MappingNode):
        what = "a list" if isinstance(root, SequenceNode) else "a single value"
        raise _refuse(source, f"holds {what}; a pipeline is a map (name: ..., stages: ...).", "", _place(source, root))
    builder = _Builder(source)
    tree = builder.build(root, _place(source, root))
    if builder.problems:
        raise SpecErrors(source, builder.problems)
    return tree


def read_value(text: str, source: str) -> Tree:
    """Read one YAML value (the right side of ``--set``); nothing at all is null. Raises SpecErrors."""
    root = _compose(text, source)
    if root is None:
        return Tree(None, Place(source), Place(source))
    builder = _Builder(source, lines=False)
    tree = builder.build(root, Place(source))
    if builder.problems:
        raise SpecErrors(source, builder.problems)
    return tree


class _TooLargeError(Exception):
    """More nodes than a pipeline can have."""


class _TooDeepError(Exception):
    """More levels than a pipeline can have."""


class _BoundedComposer(Composer):
    """Stops early: composing a large file to the end would take half a minute."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader=loader)
        self.nodes = 0
        self.level = 0
        self.warn_double_anchors = False  # YAML allows it: the nearest one above counts

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See ruamel.yaml; counts nodes and levels."""
        self.nodes += 1
        self.level += 1
        if self.nodes > 2 * MAX_NODES:  # keys are nodes as well
            raise _TooLargeError
        if self.level > MAX_DEPTH:
            raise _TooDeepError
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _compose(text: str, source: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    try:
        return yaml.compose(text)  # type: ignore[no-any-return, no-untyped-call]
    except _TooLargeError:
        raise SpecErrors(source, [_too_large(source)]) from None
    except _TooDeepError:
        raise SpecErrors(source, [_too_deep(source)]) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
        what = " ".join(part for part in (error.context, error.problem) if part)
        hint = "Indent with spaces; YAML does not allow tabs." if "'\\t'" in what else ""
        raise SpecErrors(source, [Problem(place, "", f"not valid YAML: {what}.", hint)]) from None
    except YAMLError as error:
        reason = str(error).splitlines()[0]
        raise SpecErrors(source, [Problem(Place(source), "", f"not valid YAML: {reason}.")]) from None
    except ValueError as error:
        raise SpecErrors(source, [Problem(Place(source), "", f"not valid YAML: {error}.")]) from None


def _too_large(source: str) -> Problem:
    message = f"the file has more than {MAX_NODES:,} values after its aliases are expanded."
    return Problem(Place(source), "", message, "Split it, or use fewer aliases.")


def _too_deep(source: str) -> Problem:
    return Problem(Place(source), "", f"the file is nested deeper than {MAX_DEPTH} levels.")


def _place(source: str, node: Node) -> Place:
    return Place(source, node.start_mark.line + 1, node.start_mark.column + 1)


class _Builder:
    """Builds the tree of one document, collecting what is not allowed."""

    def __init__(self, source: str, lines: bool = True) -> None:
        self.source = source
        self.lines = lines
        self.problems: list[Problem] = []
        self.budget = Budget()
        self.open: set[int] = set()

    def build(self, node: Node, key: Place) -> Tree:
        try:
            return self._node(node, key)
        except _TooLargeError:
            self.problems.append(_too_large(self.source))
        except _TooDeepError:
            self.problems.append(_too_deep(self.source))
        return Tree({}, key, key)

    def place(self, node: Node) -> Place:
        return _place(self.source, node) if self.lines else Place(self.source)

    def refuse(self, node: Node, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.place(node), "", message, hint))

    def _node(self, node: Node, key: Place) -> Tree:
        if not self.budget.take():
            raise _TooLargeError
        if isinstance(node, ScalarNode):
            place = key if node.value == "" and not node.style else self.place(node)
            return Tree(self._scalar(node), place, key)
        place = self.place(node)
        if id(node) in self.open:
            self.refuse(node, f"alias *{node.anchor} contains itself.")
            return Tree(None, place, key)
        if len(self.open) >= MAX_DEPTH:
            raise _TooDeepError
        self.open.add(id(node))
        try:
            if node.tag not in (_TAG + "map", _TAG + "seq"):
                self._refuse_tag(node)
            if isinstance(node, SequenceNode):
                return Tree([self._node(item, self.place(item)) for item in node.value], place, key)
            return Tree(self._mapping(node) if isinstance(node, MappingNode) else {}, place, key)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: MappingNode) -> dict[str, Tree]:
        own: dict[str, Tree] = {}
        merged: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            key_place = self.place(key_node)
            if key_node.tag == _TAG + "merge":
                merged = self._merge(value_node, merged)
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag not in _TEXT_TAGS:
                self.refuse(key_node, "keys must be text.", "Put the key in quotes.")
                continue
            name = key_node.value
            value = self._node(value_node, key_place)
            if name in own:
                self.refuse(key_node, f"the key {name!r} is there twice.", f"The first is at {own[name].key}.")
            else:
                own[name] = value
        return {**merged, **own}

    def _merge(self, node: Node, merged: dict[str, Tree]) -> dict[str, Tree]:
        """Value of a ``<<`` key: a map or a list of maps; earlier ones win."""
        for item in node.value if isinstance(node, SequenceNode) else [node]:
            tree = self._node(item, self.place(item))
            if isinstance(tree.value, dict):
                merged = {**tree.value, **merged}
            else:
                self.refuse(item, "`<<` merges maps only.")
        return merged

    def _scalar(self, node: ScalarNode) -> Any:
        text, tag = node.value, str(node.tag)
        if tag in _TEXT_TAGS:
            return text
        try:
            if tag == _TAG + "null":
                return None
            if tag == _TAG + "bool":
                return {"true": True, "false": False}[text.lower()]
            if tag == _TAG + "int":
                return _integer(text)
            if tag == _TAG + "float":
                return _finite(text)
        except (ValueError, KeyError):  # an explicit tag (!!int x), .inf, .nan
            what = {"int": "an integer", "float": "a finite number", "bool": "a boolean"}[tag.removeprefix(_TAG)]
            self.refuse(node, f"{text!r} is not {what}.")
            return None
        self._refuse_tag(node)
        return None

    def _refuse_tag(self, node: Node) -> None:
        tag = str(node.tag).replace(_TAG, "!!")
        self.refuse(node, f"the tag {tag} is not allowed.", "Use plain maps, lists, text, numbers, booleans and null.")


def _integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    for prefix, base in (("0o", 8), ("0x", 16), ("0b", 2)):
        if digits.lstrip("+-").startswith(prefix):
            return int(digits, base)
    return int(digits)


def _finite(text: str) -> float:
    number = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError(text)
    return number
