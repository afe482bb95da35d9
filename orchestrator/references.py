"""``${...}`` references: ``${params.x}``, ``${dataset}``, ``${dataset_options.x}``, ``${scale}``, ``${env:NAME}``.

There is no arithmetic and no code. A value that is exactly one reference keeps the type of what it names; inside longer
text a scalar is put in as text. ``$${`` stands for a literal ``${``. ``${stages.NAME}`` belongs into ``inputs:`` only
and is left there for the graph.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe.errors import nearest
from orchestrator.positions import MAX_NODES, Budget, EnvText, Path, Place, Problem, Tree, dotted, found

_REFERENCE = re.compile(r"\$?\$\{([^{}]*)\}")
_UNFINISHED = re.compile(r"(?<!\$)\$\{[^}]*$")
_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_STAGE = re.compile(r"\$\{stages\.([^{}.]+)\}")
_MAX_TEXT = 100_000
ROOTS = ("params", "dataset", "dataset_options", "scale")
FORMS = (
    "Allowed: ${params.NAME}, ${dataset}, ${dataset_options.NAME}, ${scale}, ${env:NAME}, and ${stages.NAME} in inputs."
)


def stage_name(text: str) -> str | None:
    """``NAME`` of a text that is exactly ``${stages.NAME}``, else None."""
    match = _STAGE.fullmatch(text.strip())
    return match.group(1) if match else None


def resolve(
    tree: Tree,
    defaults: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    used: set[str] | None = None,
) -> list[Problem]:
    """Replace all references inside ``tree``, in place.

    Args:
        tree: the merged pipeline.
        defaults: values of top-level fields that the pipeline leaves out (``scale``, ``dataset``).
        environment: for ``${env:NAME}``; the process's own by default.
        used: takes the names that something refers to.

    Returns:
        What could not be resolved.
    """
    resolver = _Resolver(tree, defaults, os.environ if environment is None else environment)
    problems = resolver.run()
    if used is not None:
        used |= resolver.used
    return problems


def idle_settings(tree: Tree, used: set[str]) -> list[Problem]:
    """Warnings for what was set for references, and nothing refers to it.

    Everything of ``--set``, and options of a data set also of the file; other variables may be for another profile.
    """
    found: list[Problem] = []
    for root in ROOTS:
        below = tree.child(root)
        for path, leaf in _leaves(below, root) if below is not None else ():
            asked = leaf.place.source.startswith("--set") or root == "dataset_options"
            read = any(name == path or name.startswith(f"{path}.") or path.startswith(f"{name}.") for name in used)
            if asked and not read and leaf.value is not None:
                message = f"has no effect: nothing in this pipeline refers to ${{{path}}}."
                found.append(Problem(leaf.place, path, message, "Set the stages' own fields instead.", "warning"))
    return found


def _leaves(tree: Tree, path: str) -> Iterator[tuple[str, Tree]]:
    if not isinstance(tree.value, dict):
        yield path, tree
        return
    for name, child in tree.value.items():
        yield from _leaves(child, f"{path}.{name}")


class _Resolver:
    """Depth-first over the tree; a value is resolved before it is copied to where it is named."""

    def __init__(self, root: Tree, defaults: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.root = root
        self.defaults = defaults
        self.environment = environment
        self.problems: list[Problem] = []
        self.budget = Budget()
        self.done: set[int] = set()
        self.open: dict[int, Path] = {}
        self.used: set[str] = set()

    def run(self) -> list[Problem]:
        """Resolve everything."""
        try:
            self._visit(self.root, ())
        except RecursionError:
            self.problems.append(Problem(self.root.place, "", "the references are nested too deeply."))
        if self.budget.left < 0:
            message = f"the references make the pipeline too large (more than {MAX_NODES:,} values)."
            self.problems.append(Problem(self.root.place, "", message))
        return self.problems

    def _visit(self, tree: Tree, path: Path) -> None:
        """Resolve a subtree; every tree is visited once."""
        if id(tree) in self.done:
            return
        self.open[id(tree)] = path
        if isinstance(tree.value, dict):
            for name, child in tree.value.items():
                self._visit(child, (*path, name))
        elif isinstance(tree.value, list):
            for index, child in enumerate(tree.value):
                self._visit(child, (*path, index))
        elif type(tree.value) is str and "${" in tree.value and not (_in_inputs(path) and stage_name(tree.value)):
            self._text(tree, path)
        del self.open[id(tree)]
        self.done.add(id(tree))

    def _fail(self, tree: Tree, path: Path, message: str, hint: str = "") -> None:
        tree.broken = True
        self.problems.append(Problem(tree.place, dotted(path), message, hint))

    def _text(self, tree: Tree, path: Path) -> None:
        text: str = tree.value
        if _UNFINISHED.search(text):
            self._fail(tree, path, f"{text!r} has a reference without its closing brace.", FORMS)
            return
        whole = _REFERENCE.fullmatch(text)
        if whole and not text.startswith("$$"):
            target = self._lookup(whole.group(1), tree, path)
            if target is not None:
                copy = self._copy(target, tree.place, tree.key)
                tree.value, tree.via, tree.broken = copy.value, text, copy.broken
            return
        parts: list[str] = []
        secret, end = False, 0
        for match in _REFERENCE.finditer(text):
            parts.append(text[end : match.start()])
            end = match.end()
            if match.group().startswith("$$"):
                parts.append(match.group()[1:])
                continue
            target = self._lookup(match.group(1), tree, path)
            if target is None:
                continue
            if isinstance(target.value, dict | list):
                self._fail(tree, path, f"{match.group()} is a map or a list and cannot stand inside text.")
                continue
            secret = secret or isinstance(target.value, EnvText)
            parts.append(_as_text(target.value))
        joined = "".join([*parts, text[end:]])
        if len(joined) > _MAX_TEXT:
            self._fail(tree, path, f"the references make a text of more than {_MAX_TEXT:,} characters.")
        elif not tree.broken:
            tree.value, tree.via = EnvText(joined) if secret else joined, text

    def _lookup(self, name: str, tree: Tree, path: Path) -> Tree | None:
        """The resolved tree that a reference names, or None after a problem was noted."""
        name = name.strip()
        if name.startswith("env:"):
            return self._environment(name, tree, path)
        self.used.add(name)
        parts = name.split(".")
        if parts[0] == "stages":
            self._fail(tree, path, f"${{{name}}} can only stand in a stage's inputs, alone, as ${{stages.NAME}}.")
            return None
        if parts[0] not in ROOTS:
            self._fail(tree, path, f"${{{name}}} is not a reference that exists.", _forms(parts[0]))
            return None
        here = self.root
        for index, part in enumerate(parts):
            below = here.child(part) or (here.child(int(part)) if part.isdigit() else None)
            if below is None:
                return self._absent(name, here, parts[:index], part, tree, path)
            here = below
            if index == len(parts) - 1 or type(here.value) is str:
                if id(here) in self.open:
                    start = dotted(self.open[id(here)])
                    self._fail(tree, path, f"${{{name}}} goes round in a circle: {start} needs itself.")
                    return None
                self._visit(here, tuple(parts[: index + 1]))
            if here.broken:
                tree.broken = True
                return None
        return here

    def _absent(self, name: str, here: Tree, walked: list[str], part: str, tree: Tree, path: Path) -> Tree | None:
        if not walked and part in self.defaults:
            return Tree(self.defaults[part], tree.place, tree.key)
        where = ".".join(walked) or "the pipeline"
        if isinstance(here.value, dict):
            self._fail(tree, path, f"${{{name}}}: {where} has no {part!r}.", nearest(part, map(str, here.value)))
        else:
            self._fail(tree, path, f"${{{name}}}: {where} is {found(here.value)}, which has no {part!r}.")
        return None

    def _environment(self, name: str, tree: Tree, path: Path) -> Tree | None:
        match = _ENV.fullmatch(name)
        if match is None:
            hint = "Write ${env:NAME} or ${env:NAME:-default}."
            self._fail(tree, path, f"${{{name}}} is not an environment reference.", hint)
            return None
        variable, default = match.groups()
        value = self.environment.get(variable)
        if not value and default is not None:
            value = default
        if value is None:
            hint = f"Set it, or write ${{env:{variable}:-default}}."
            self._fail(tree, path, f"the environment variable {variable} is not set.", hint)
            return None
        return Tree(EnvText(value), tree.place, tree.key)

    def _copy(self, target: Tree, place: Place, key: Place) -> Tree:
        """A copy of a resolved subtree, at the place of its reference."""
        if not self.budget.take():
            return Tree(None, place, key, broken=True)
        value = target.value
        if isinstance(value, dict):
            value = {name: self._copy(child, child.place, child.key) for name, child in value.items()}
        elif isinstance(value, list):
            value = [self._copy(child, child.place, child.key) for child in value]
        return Tree(value, place, key, target.via, target.broken)


def _in_inputs(path: Path) -> bool:
    return len(path) in (4, 5) and path[0] == "stages" and path[2] == "inputs"


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _forms(name: str) -> str:
    close = nearest(name, ROOTS).split("Allowed:")[0]
    return f"{close}{FORMS}"
