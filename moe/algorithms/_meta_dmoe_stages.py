"""The constants of Meta-DMoE by pipeline stage: data set -> part -> fields of that stage's ``config:``.

A view of ``PRESETS``; nothing new is decided here.
Parts: ``split expert features aggregator student distill evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.algorithms._meta_dmoe_presets import PRESETS

Fields = dict[str, Any]


def _parts(preset: Mapping[str, Any]) -> dict[str, Fields]:
    groups = preset["num_experts"]
    meta = dict(preset["meta"])
    distill = {name: value for name, value in meta.items() if name != "step"}
    # The aggregator's rate stays constant where the student's follows a cosine (rxrx1).
    constant = meta.get("schedule") == "cosine"
    return {
        "split": {"groups": groups},
        "expert": {"groups": groups, "backbone": preset["backbone"], "training": dict(preset["expert"])},
        "features": {"groups": groups},
        "aggregator": {
            "aggregator": dict(preset.get("aggregator", {})),
            "training": dict(preset["aggregator_training"]),
        },
        "student": {"backbone": preset["backbone"], "training": dict(preset["student"])},
        "distill": {
            "training": {
                **distill,
                "meta": dict(meta["step"]),
                "aggregator_schedule": "constant" if constant else "same",
            }
        },
        "evaluate": {"support": meta["support"]},
    }


STAGE_PRESETS: dict[str, dict[str, Fields]] = {dataset: _parts(preset) for dataset, preset in PRESETS.items()}
