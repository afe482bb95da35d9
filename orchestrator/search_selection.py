"""On which rows a search selects: what is declared, held against the rows of the data that arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.errors import MoepipeError, SpecError
from orchestrator.stages.search import SearchConfig
from workers.context import Context


def check_selection(config: SearchConfig, context: Context) -> None:
    """Hold the declared selection against the rows: who is in the validation split.

    Raises:
        SpecError: the validation rows belong to test domains, or to other domains than was declared.
    """
    data, written = context.inputs.get("data", ()), plain(config)
    searched = config.space.get("val_split")
    names = list(searched.choice or ()) if searched is not None else [written.get("val_split")]
    if not data or not all(isinstance(name, str) for name in names):
        return
    from workers.data import read_index

    index = read_index(data[0])
    domains = {name: set(index.column(index.domain_field, rows).tolist()) for name, rows in index.splits.items()}
    trained = set().union(*(domains.get(name, set()) for name in written.get("splits") or ("train",)))
    for split in names:
        if split in domains:
            _check_split(split, domains[split], trained, domains.get("test", set()), config.selection)


def _check_split(split: str, rows: set[int], trained: set[int], test: set[int], declared: str) -> None:
    if rows & (test - trained):
        raise SpecError(f"The split {split!r} holds rows of test domains.", "Selection never looks at test domains.")
    actual = "training_domains" if rows <= trained else "validation_domains"
    if actual != declared:
        whose = "training domains" if rows <= trained else "domains that are not trained on"
        raise SpecError(
            f"selection is {declared!r}, but the rows of split {split!r} are of {whose}.", f"Write selection: {actual}."
        )


def plain(config: SearchConfig) -> Mapping[str, Any]:
    """The wrapped config as written, with what presets and defaults fill in; raw where it is incomplete."""
    try:
        return config.point({}).model_dump(mode="json")
    except (ValueError, MoepipeError):
        return config.stage.config
