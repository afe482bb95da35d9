"""Presets in the YAML: ``preset: meta_dmoe/camelyon17/expert`` fills a stage's config from the paper's table.

What is written beside ``preset`` wins over it, field by field. The preset's text is ``algorithm/dataset/part``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.algorithms.base import ALGORITHMS
from moe.errors import SpecError, nearest
from workers.overlay import overlay


def fill_preset(values: Any) -> Any:
    """``values`` of a config block with the fields of its ``preset`` underneath (for a pydantic ``before`` validator).

    Raises:
        ValueError: the preset does not exist; names the nearest one.
    """
    if not isinstance(values, Mapping) or not values.get("preset"):
        return values
    try:
        return overlay(preset(str(values["preset"])), values)
    except SpecError as error:
        raise ValueError(str(error)) from None


def preset(text: str) -> dict[str, Any]:
    """Config fields of ``algorithm/dataset/part``.

    Raises:
        SpecError: the text has not three parts, or one of them is unknown.
    """
    parts = text.split("/")
    if len(parts) != 3:
        raise SpecError(
            f"A preset is written algorithm/dataset/part, not {text!r}.", "E.g. meta_dmoe/camelyon17/expert."
        )
    algorithm, dataset, part = parts
    table: Mapping[str, Mapping[str, dict[str, Any]]] = getattr(ALGORITHMS.load(algorithm), "STAGE_PRESETS", {})
    if dataset not in table:
        raise SpecError(f"{algorithm} has no preset for dataset {dataset!r}.", nearest(dataset, table))
    if part not in table[dataset]:
        raise SpecError(f"The preset {algorithm}/{dataset} has no part {part!r}.", nearest(part, table[dataset]))
    return table[dataset][part]
