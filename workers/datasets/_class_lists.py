"""WordNet ids of sets that are parts of ImageNet. No torch here: planning reads them."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources


@lru_cache(maxsize=1)
def class_lists() -> dict[str, tuple[str, ...]]:
    """Set -> its sorted WordNet ids: ``tiny-imagenet-200``, ``tiny-imagenet-r``, ``imagenet-r``."""
    file = resources.files("workers.datasets").joinpath("assets/class_lists.json")
    lists: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return {name: tuple(sorted(ids)) for name, ids in lists.items()}
