"""The stages of each method that ``moepipe init`` knows, in order; see :mod:`orchestrator.scaffold`.

The presets are those of the algorithm for the chosen dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.scaffold import Recipe, Step


def _preset(part: str) -> Mapping[str, Any]:
    return {"preset": f"meta_dmoe/${{dataset}}/{part}"}


_DATA = Step("data", "prepare")
_ERM = Step(
    "erm", "train", {"data": ("data",)}, _preset("student"), "One network on all training rows: baseline and start."
)

RECIPES: Mapping[str, Recipe] = {
    "erm": Recipe(
        "Plain supervised training on all domains, scored on unseen ones with and without test-time adaptation.",
        (
            _DATA,
            _ERM,
            Step("evaluate", "evaluate", {"data": ("data",), "erm": ("erm",)}, _preset("evaluate")),
            Step("report", "report", {"metrics": ("evaluate",)}, {"title": "ERM on ${dataset}"}),
        ),
    ),
    "meta_dmoe": Recipe(
        "Meta-DMoE: experts on groups of domains, distilled into a student that adapts to unseen domains.",
        (
            _DATA,
            Step("groups", "split", {"data": ("data",)}, _preset("split")),
            Step(
                "experts",
                "train",
                {"data": ("data",), "groups": ("groups",)},
                _preset("expert"),
                "One expert per group of domains, trained in parallel.",
            ),
            _ERM,
            Step("features", "features", {"data": ("data",), "model": ("experts",)}, _preset("features")),
            Step("aggregator", "aggregate", {"data": ("data",), "features": ("features",)}, _preset("aggregator")),
            Step(
                "student",
                "distill",
                {
                    "data": ("data",),
                    "groups": ("groups",),
                    "features": ("features",),
                    "aggregator": ("aggregator",),
                    "student": ("erm",),
                },
                _preset("distill"),
            ),
            Step(
                "evaluate",
                "evaluate",
                {
                    "data": ("data",),
                    "erm": ("erm",),
                    "student": ("student",),
                    "aggregator": ("aggregator",),
                    "experts": ("experts",),
                    "features": ("features",),
                },
                _preset("evaluate"),
            ),
            Step(
                "report",
                "report",
                {"metrics": ("evaluate",), "student": ("student",)},
                {"title": "Meta-DMoE on ${dataset}"},
            ),
        ),
    ),
}
