"""How many rows a stage will read, for its weight in the order of starting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def rows_in(inputs: Mapping[str, Sequence[Mapping[str, Any]]], splits: Sequence[str], otherwise: float) -> float:
    """Rows of some splits together, as the ``data`` artifact's ``meta`` counts them.

    Args:
        inputs: port -> ``meta`` of the arriving artifacts.
        splits: names of splits; an unknown one counts nothing, the stage itself refuses it when it runs.
        otherwise: answer when the ``data`` artifact does not count its rows.
    """
    counts = [data["rows"] for data in inputs.get("data", ()) if "rows" in data]
    return float(sum(count.get(split, 0) for count in counts for split in splits)) if counts else otherwise
