"""Strict parsing of plain values: text is not a number, 1 is not true; lists still become tuples and text paths.

pydantic's strict JSON mode says exactly that, but a model with a "before" validator hands plain Python values on, and
strict Python mode then refuses lists for tuples and text for paths. Such a refusal is taken back where the lenient mode
agrees; refusals of single values stand, also inside such lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_json

M = TypeVar("M", bound=BaseModel)
_WANTED = {int: "int_type", float: "float_type", bool: "bool_type", str: "string_type"}
_SINGLE = {"int_type", "int_from_float", "float_type", "bool_type", "string_type"}


def parse(model: type[M], raw: Mapping[str, Any]) -> tuple[M | None, Sequence[ErrorDetails]]:
    """A model from plain (JSON-like) values, or what is wrong with them.

    Raises:
        MoepipeError: a validator of the model raised it.
    """
    text = to_json(raw)
    try:
        return model.model_validate_json(text, strict=True), ()
    except ValidationError as error:
        strict = error.errors(include_url=False)
    kept = [item for item in strict if _stands(item, strict)]
    try:
        lenient = model.model_validate_json(text)
    except ValidationError as error:
        told = error.errors(include_url=False)
        seen = {item["loc"] for item in told}
        return None, [*told, *(item for item in kept if item["loc"] not in seen)]
    lifted = [item["loc"] for item in strict if item["type"] == "tuple_type"]
    if lifted:
        kept += _guessed(raw, lenient.model_dump(mode="json"), lifted)
    return (None, kept) if kept else (lenient, ())


def _guessed(raw: Any, read: Any, below: Sequence[tuple[int | str, ...]]) -> list[ErrorDetails]:
    """Single values inside lists that strict mode did not look into and lenient mode turned into another type."""
    out: list[ErrorDetails] = []

    def walk(value: Any, got: Any, loc: tuple[int | str, ...]) -> None:
        if isinstance(value, Mapping) and isinstance(got, Mapping):
            for name in value.keys() & got.keys():
                walk(value[name], got[name], (*loc, name))
        elif isinstance(value, list) and isinstance(got, list) and len(value) == len(got):
            for index, pair in enumerate(zip(value, got, strict=True)):
                walk(*pair, (*loc, index))
        elif type(got) in _WANTED and type(value) is not type(got) and (type(value), type(got)) != (int, float):
            inside = any(loc[: len(start)] == start for start in below)
            if inside and isinstance(value, str | int | float):
                out.append({"type": _WANTED[type(got)], "loc": loc, "msg": "", "input": value})

    walk(raw, read, ())
    return out


def _stands(item: ErrorDetails, others: Sequence[ErrorDetails]) -> bool:
    """Whether a refusal in strict mode is about a single value of the wrong type."""
    if item["type"] not in _SINGLE or isinstance(item["input"], list | dict):
        return False
    # In a union each branch refuses with its own name at the end; a refusal for another reason may be lifted.
    branches = [other for other in others if other["loc"][:-1] == item["loc"][:-1] and other["input"] == item["input"]]
    tagged = isinstance(item["loc"][-1], str) and len(branches) > 1
    return not tagged or all(other["type"] in _SINGLE for other in branches)
