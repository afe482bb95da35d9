"""An algorithm of ``moe/algorithms`` with the settings of a supervised stage; free of torch."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from moe.algorithms.base import Algorithm, algorithm
from moe.errors import SpecError, nearest
from moe.specs import BackboneSpec
from workers.settings import AlgorithmBlock, TrainSettings

SUPERVISED = ("erm", "gmoe", "emoe", "fish", "irm", "coral", "sma", "swad")
"""Algorithms that train on labelled rows by themselves; the others are pipelines of several stages."""
_SHARED = (
    "batch_size",
    "epochs",
    "steps",
    "lr",
    "weight_decay",
    "optimizer",
    "schedule",
    "decay",
    "warmup_epochs",
    "clip",
)


def make_algorithm(
    block: AlgorithmBlock, backbone: BackboneSpec, settings: TrainSettings, task: str = "multiclass"
) -> Algorithm[Any]:
    """The algorithm with the settings of a stage.

    Args:
        block: which, and what it takes beyond the stage's own settings.
        backbone: its network.
        settings: rates and length; they become the algorithm's ``train``.
        task: of the data set.

    Raises:
        SpecError: unknown or not a supervised algorithm, or settings that do not fit.
    """
    if block.name not in SUPERVISED:
        raise SpecError(
            f"{block.name!r} is not an algorithm that one supervised stage can run.", nearest(block.name, SUPERVISED)
        )
    kind = algorithm(block.name)
    given = [name for name in ("backbone", "train") if name in block.options]
    if given:
        where = {"backbone": "backbone", "train": "training"}[given[0]]
        raise SpecError(
            f"The options of {block.name} have {given[0]!r}, which comes from the stage.",
            f"Write it into the stage's `{where}`.",
        )
    train = {name: getattr(settings, name) for name in _SHARED}
    if train["epochs"] is not None:
        train["steps"] = None  # one of the two; the stage's own loop counts
    try:
        return kind(kind.Config(**{**block.options, "backbone": backbone.model_dump(), "train": train}), task)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        fields = [name for name in kind.Config.model_fields if name not in ("backbone", "train")]
        raise SpecError(
            f"The options of {block.name} do not fit: {found}.", f"It takes: {', '.join(fields)}."
        ) from None
