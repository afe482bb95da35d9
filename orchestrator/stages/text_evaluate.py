"""``text_evaluate``: choose each method's rate by its selection score, and test it in and out of domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase
from orchestrator.stages.text_search import TextSearchConfig, weights_digest
from workers.context import Context


class TextEvaluateConfig(TextSearchConfig):
    """The search whose methods are tested, and in which forms."""

    forms: tuple[Literal["trained", "merged", "split"], ...] = Field(
        default=("trained", "merged", "split"),
        min_length=1,
        description="trained: as it was tuned, gates included; merged: experts put back into a dense layer; split: a "
        "dense network split at test time only",
    )
    batch_size: int = Field(default=32, ge=1, description="texts per pass (8 in the public code)")
    merge_bias: Literal["uniform", "usage"] = Field(
        default="uniform", description="how merging averages the experts' shares of the output bias"
    )


class Stage(StageBase[TextEvaluateConfig]):
    """Select and test, one member per method and kind of tuning."""

    output: ClassVar[str] = "text_evaluation"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {
        "tokens": Port("tokens", doc="the encoded texts"),
        "models": Port("text_model", many=True, doc="every run of the search"),
        "split": Port("text_split", optional=True, doc="clusters, for splitting dense networks at test time"),
    }
    Config: ClassVar[type[TextSearchConfig]] = TextEvaluateConfig

    def members(self, config: TextEvaluateConfig) -> list[Member]:
        """One member per method and tuning."""
        return [Member(f"{m} {t}", {"method": m, "tuning": t}) for t in config.tunings for m in config.methods]

    def external(self, config: TextEvaluateConfig, data_root: str) -> Mapping[str, str]:
        """The pretrained weights beneath the tuned ones."""
        return weights_digest(config.model, data_root)

    def run(self, config: TextEvaluateConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``evaluation.json``; ``meta`` is the same record."""
        from workers.text_evaluate import evaluate_member

        params = member.params
        return evaluate_member(
            config.settings(),
            params["method"],
            params["tuning"],
            config.forms,
            config.batch_size,
            config.merge_bias,
            context,
        )
