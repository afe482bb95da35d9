"""``--set a.b.c=value``: a dotted path and a YAML value, put into the tree before references are resolved.

``value`` is read as YAML: ``3e-4`` and ``3`` are numbers, ``true`` a boolean, ``null`` (or nothing) null, ``[1, 2]``
a list, ``{a: 1}`` a map, everything else text; ``'"3"'`` is the text 3. List entries go by index: ``seeds.0=7``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe.errors import nearest
from orchestrator.positions import Path, Place, Problem, SpecErrors, Tree, dotted, found
from orchestrator.spec import PipelineSpec
from orchestrator.validation import field_names
from orchestrator.yaml_reader import read_value


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> list[Problem]:
    """Apply ``path=value`` texts in order, in place; the problems name them ``--set #1``, ``--set #2``, ..."""
    problems: list[Problem] = []
    for number, text in enumerate(overrides, 1):
        source = f"--set #{number}"
        path, equals, value = text.partition("=")
        parts = _parts(path)
        if not equals or not all(part != "" for part in parts):
            message = f"expected PATH=VALUE, found {text!r}."
            problems.append(Problem(Place(source), "", message, "For example: stages.distill.config.lr=3e-4."))
            continue
        try:
            new = read_value(value, source)
        except SpecErrors as error:
            first = error.problems[0].message
            hint = "Put the value in quotes: 'PATH=\"text\"'."
            problems.append(Problem(Place(source), dotted(parts), f"the value {value!r} is {first}", hint))
            continue
        problem = _put(tree, parts, new, Place(source))
        problems += [problem] if problem else []
    return problems


def _parts(path: str) -> Path:
    names = path.strip().replace("[", ".").replace("]", "").split(".")
    return tuple(int(name) if name.isdigit() else name for name in names)


def _put(tree: Tree, parts: Path, new: Tree, place: Place) -> Problem | None:
    """Put ``new`` at a path, making maps on the way where the format has them."""
    here: Tree | None = tree
    for index, part in enumerate(parts):
        problem = _impossible(here, parts[:index], part)
        if problem:
            return Problem(place, dotted(parts), *problem)
        here = here.child(part if isinstance(here.value, list) else str(part)) if here else None
    here = tree
    for index, part in enumerate(parts):
        if here.value is None:
            here.value = {}
        key = part if isinstance(here.value, list) else str(part)
        below = here.child(key)
        if index == len(parts) - 1:
            below = Tree(new.value, place, below.key if below else place)
        elif below is None:
            below = Tree({}, place, place)
        here.value[key] = below
        here = below
    return None


def _impossible(here: Tree | None, walked: Path, part: str | int) -> tuple[str, str] | None:
    """Why ``part`` cannot be set below ``walked`` (message, hint), or None; ``here`` is None when it is not there."""
    where = dotted(walked) or "the pipeline"
    value = {} if here is None or here.value is None else here.value
    if isinstance(value, list):
        if isinstance(part, int) and part < len(value):
            return None
        return f"{where} is a list of {len(value)}; {part!r} is not one of its indices.", ""
    names = _names(value, walked) if isinstance(value, dict) else set()
    if names is None or str(part) in names:
        return None
    if names or walked in ((), ("params",), ("stages",)):
        return f"{where} has no {str(part)!r}.", nearest(str(part), names)
    shown = "a single value" if isinstance(value, dict) else found(value)
    return f"{where} is {shown}, which has nothing inside to set.", "Set it as a whole, or set what it refers to."


def _names(value: Mapping[str, Tree], walked: Path) -> set[str] | None:
    """Names that may be set in a map; None: any, because its own model checks them later."""
    if walked[:1] == ("params",) or walked == ("stages",):
        return set(value)
    in_stage = walked[0] == "stages" and len(walked) > 2 if walked else False
    if walked[:1] == ("dataset_options",) or (
        in_stage and (walked[2] in ("config", "inputs") or walked[-1] == "custom")
    ):
        return None
    return field_names(PipelineSpec, walked)
