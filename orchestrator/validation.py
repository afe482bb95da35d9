"""Pydantic's findings in the words of the YAML: place, field path, what was expected, what was found, nearest name.

Values are validated strictly (text is not a number, ``1`` is not true), except the text of environment variables,
which is read as YAML where the field is not text.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from moe.errors import MoepipeError, nearest
from orchestrator.positions import EnvText, Path, Problem, SpecErrors, Tree, dotted, found
from orchestrator.strictness import parse
from orchestrator.yaml_reader import read_value

M = TypeVar("M", bound=BaseModel)

_WORDS = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
    "dataclass_type": "a map",
    "none_required": "null",
    "greater_than": "a value greater than {gt}",
    "greater_than_equal": "a value of at least {ge}",
    "less_than": "a value less than {lt}",
    "less_than_equal": "a value of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
}
_WHOLE = {"value_error", "assertion_error"}
_BOOLEANS_OF_YAML_1_1 = {"yes", "no", "on", "off", "y", "n"}


def validate(model: type[M], tree: Tree, prefix: Path = ()) -> tuple[M | None, list[Problem]]:
    """Validate a subtree against a model.

    Args:
        model: pydantic model.
        tree: the subtree; text of environment variables in it is replaced by the values it stands for.
        prefix: field path of the subtree, for messages.

    Returns:
        The model, or None, and the problems. Values already reported as broken give no problem again, but no model
        either.
    """
    try:
        found_model, errors = parse(model, tree.plain())
        if found_model is None and _read_environment(errors, tree):
            found_model, errors = parse(model, tree.plain())
    except MoepipeError as error:  # a model's own validator looked something up
        return None, [] if is_broken(tree) else [Problem(tree.key, dotted(prefix), error.message, error.hint)]
    return found_model, _problems(errors, model, tree, prefix)


def is_broken(tree: Tree) -> bool:
    """Whether a problem inside the tree was reported before."""
    if isinstance(tree.value, dict):
        return any(is_broken(child) for child in tree.value.values())
    if isinstance(tree.value, list):
        return any(is_broken(child) for child in tree.value)
    return tree.broken


def _read_environment(errors: Sequence[ErrorDetails], tree: Tree) -> bool:
    """Turn the environment texts that the errors point at into YAML values; True when there was one."""
    changed = False
    for item in errors:
        here, _ = tree.find(item["loc"])
        if isinstance(here.value, EnvText):
            try:
                value = read_value(str(here.value), "environment").value
            except SpecErrors:
                continue
            if not isinstance(value, str | dict | list):
                here.value, changed = value, True
    return changed


def _problems(errors: Sequence[ErrorDetails], model: type[BaseModel], tree: Tree, prefix: Path) -> list[Problem]:
    """One problem per place; the branches of a union are told as one sentence."""
    wanted: dict[Path, tuple[Tree, list[str], str]] = {}
    out: list[Problem] = []
    union: set[Path] = set()
    for item in errors:
        loc: Path = item["loc"]
        here, rest = tree.find(loc)
        if here.broken or (item["type"] in _WHOLE and is_broken(here)):
            continue
        path = _path(tree, loc)
        if item["type"] == "missing":
            name = loc[-1]
            hint = _description(model, loc)
            out.append(Problem(here.key, dotted((*prefix, *path, name)), "is missing.", hint))
        elif item["type"] == "extra_forbidden":
            hint = nearest(str(loc[-1]), field_names(model, loc[:-1]))
            out.append(Problem(here.key, dotted((*prefix, *path)), "is not a known key.", hint))
        else:
            if rest:
                union.add(path)
            wanted.setdefault(path, (here, [], ""))[1].append(_expected(item))
            if hint := _hint(item, here):
                wanted[path] = (*wanted[path][:2], hint)
    for path, (here, words, hint) in wanted.items():
        deeper = any(other != path and other[: len(path)] == path for other in wanted)
        if not (path in union and deeper):
            out.append(Problem(here.place, dotted((*prefix, *path)), _sentence(words, here), hint))
    return out


def _path(tree: Tree, loc: Path) -> Path:
    """The parts of a pydantic location that exist in the tree."""
    path: list[str | int] = []
    for part in loc:
        below = tree.child(part)
        if below is not None:
            path.append(part)
            tree = below
    return tuple(path)


def _sentence(words: list[str], here: Tree) -> str:
    via = f" (from {here.via})" if here.via else ""
    complete = [word for word in words if word.endswith(".")]
    if complete:
        return " ".join(dict.fromkeys(complete)) + via
    return f"expected {' or '.join(dict.fromkeys(words))}, found {found(here.value)}{via}."


def _expected(item: Mapping[str, Any]) -> str:
    """What one error wanted: a noun phrase, or a whole sentence (ends with a full stop)."""
    context = item.get("ctx", {})
    if item["type"] in _WHOLE:
        return f"{str(context.get('error', item['msg'])).rstrip('.')}."
    if item["type"] == "union_tag_invalid":
        return f"one of {context['expected_tags']} as {context['discriminator']}"
    if item["type"] == "union_tag_not_found":
        return f"a map with {context['discriminator']}"
    template = _WORDS.get(item["type"])
    if template is None:
        return str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return template.format_map(shown)


def _hint(item: Mapping[str, Any], here: Tree) -> str:
    kind, value = item["type"], here.value
    if not isinstance(value, str) or isinstance(value, EnvText):
        return ""
    if kind in ("literal_error", "enum"):
        allowed = str(item["ctx"]["expected"]).replace(" or ", ", ")
        return nearest(value, [name.strip().strip("'") for name in allowed.split(",")]).split("Allowed:")[0].strip()
    if kind.startswith("bool_") and value.lower() in _BOOLEANS_OF_YAML_1_1:
        return "YAML 1.2 knows only true and false."
    if kind.startswith(("int_", "float_", "bool_")):
        try:
            number = read_value(value, "").value
        except SpecErrors:
            return ""
        return "Remove the quotes." if isinstance(number, int | float) else ""
    return ""


def _branches(annotation: Any) -> list[Any]:
    """The alternatives of a type, without Annotated and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _branches(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for part in get_args(annotation) if part is not type(None) for branch in _branches(part)]
    return [annotation]


def _below(annotation: Any, part: str | int) -> list[Any]:
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, info in annotation.model_fields.items():
            if part in (name, info.alias):
                return _branches(info.annotation)
        return []
    if origin in (dict, Mapping):
        return _branches(get_args(annotation)[1])
    if origin in (list, tuple, set, frozenset) and isinstance(part, int):
        return _branches(get_args(annotation)[0])
    return []


def _types_at(model: type[BaseModel], loc: Path) -> list[Any]:
    """The types that can stand at a pydantic location."""
    here: list[Any] = [model]
    for part in loc:
        below = [kind for annotation in here for kind in _below(annotation, part)]
        here = below or here  # no such child: the name of a union branch
    return here


def field_names(model: type[BaseModel], loc: Path) -> set[str]:
    """Names of the fields that a map at a location may have; empty where keys are free."""
    models = [kind for kind in _types_at(model, loc) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return {info.alias or name for kind in models for name, info in kind.model_fields.items()}


def _description(model: type[BaseModel], loc: Path) -> str:
    for kind in _types_at(model, loc[:-1]):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, info in kind.model_fields.items():
                if loc[-1] in (name, info.alias):
                    return info.description or ""
    return ""
