"""The documentation of pydantic fields in the words of YAML: type, bounds, default, text and presets."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_LIMITS = (
    ("gt", "> {}"),
    ("ge", ">= {}"),
    ("lt", "< {}"),
    ("le", "<= {}"),
    ("multiple_of", "a multiple of {}"),
    ("min_length", "at least {} long"),
    ("max_length", "at most {} long"),
)


@dataclass(frozen=True)
class FieldDoc:
    """One field or port."""

    name: str
    type: str
    default: str
    bounds: str
    doc: str
    presets: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = [self.type, *([self.bounds] if self.bounds else []), self.default]
        lines = [f"{self.name}: {', '.join(facts)}", *([f"    {self.doc}"] if self.doc else [])]
        if self.presets:
            lines.append(
                "    presets: " + ", ".join(f"{name} {yaml_words(value)}" for name, value in self.presets.items())
            )
        return "\n".join(lines)


Presets = Mapping[str, Mapping[str, Any]]


def presets_of(model: type[BaseModel]) -> Presets:
    """Dataset -> values of some fields: ``PRESETS`` of the model's module, or of the class ``Method`` in it."""
    module = sys.modules[model.__module__]
    found: Presets = getattr(module, "PRESETS", None) or getattr(getattr(module, "Method", None), "PRESETS", {})
    return found


def inside(presets: Presets, name: str) -> Presets:
    """The presets of a block inside a model."""
    return {key: values[name] for key, values in presets.items() if isinstance(values.get(name), Mapping)}


def model_fields(model: type[BaseModel], presets: Presets | None = None) -> Iterator[FieldDoc]:
    """The documentation of a model's fields, in order of declaration.

    Args:
        model: pydantic model.
        presets: values by dataset; those of the model's module when None.
    """
    presets = presets_of(model) if presets is None else presets
    for name, info in model.model_fields.items():
        chosen = {
            key: values[name]
            for key, values in presets.items()
            if name in values and not isinstance(values[name], Mapping)
        }
        yield FieldDoc(name, type_words(info.annotation), _default(info), _bounds(info), info.description or "", chosen)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "optional"
    return f"default {yaml_words(value)}"


def yaml_words(value: Any) -> str:
    """A default value as it is written in YAML."""
    if isinstance(value, BaseModel):
        inner = value.model_dump(mode="json", exclude_defaults=True)
        return yaml_words(inner) if inner else "{}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_words(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(yaml_words(item) for item in value) + "]"
    if isinstance(value, str):
        plain = (
            value.replace("_", "").isalnum() and value[0].isalpha() and value.lower() not in ("true", "false", "null")
        )
        return value if plain else json.dumps(value, ensure_ascii=False)
    return str(value)


def _bounds(info: FieldInfo) -> str:
    """Limits from the field's constraints, low ones first."""
    words: list[str] = []
    for attribute, words_for in _LIMITS:
        limits = [getattr(part, attribute, None) for part in info.metadata]
        words += [words_for.format(limit) for limit in limits if limit is not None]
    return ", ".join(dict.fromkeys(words))


def type_words(annotation: Any) -> str:
    """A Python type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin is Literal:
        return " | ".join(yaml_words(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_words(part) for part in arguments)
    if origin in (list, tuple, set, frozenset, Sequence):
        return f"list of {type_words(arguments[0])}" if arguments else "list"
    if origin in (dict, Mapping) or annotation is dict:
        inner = type_words(arguments[1]) if len(arguments) == 2 else "anything"
        return "map" if inner == "anything" else f"map of {inner}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "map"
    words = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything", type(None): "null"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))
