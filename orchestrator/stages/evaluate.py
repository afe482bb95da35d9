"""``evaluate``: adapt every method to every unseen domain and score them on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages._presets import fill_preset
from orchestrator.stages.base import NETWORKS, Member, Port, StageBase, StageConfig
from workers.context import Context

Owner = Literal["erm", "student"]
Network = Literal["erm", "aggregator", "student", "oracle"]


def _default_adaptations() -> dict[Owner, dict[str, dict[str, Any]]]:
    return {"erm": {"bn": {}, "tent": {}}, "student": {"distill": {}}}


class EvaluateConfig(StageConfig):
    """Who adapts on what, and what is reported."""

    preset: str | None = Field(default=None, description="algorithm/dataset/part whose settings to start from")
    split: str = Field(default="test", description="split that is scored")
    protocol: Literal["official", "split"] = Field(
        default="official",
        description="official: adapt on the first `support` rows of each domain, score all rows; split: adapt on the "
        "domain's rows of <split>_support, score the split",
    )
    support: int = Field(default=64, ge=1, description="unlabelled images that a domain may be adapted on")
    adaptations: dict[Owner, dict[str, dict[str, Any]]] = Field(
        default_factory=_default_adaptations,
        description="network -> test-time adaptation -> its settings; distill takes the student's own by default",
    )
    labels: dict[Network, str] = Field(
        default_factory=dict, description="network -> what the table calls it, where several evaluations share a table"
    )
    limit: int | None = Field(default=None, ge=1, description="score at most so many rows of a domain")
    curve: tuple[int, ...] = Field(default=(), description="support sizes of the adaptation curve")
    streams: tuple[str, ...] = Field(
        default=(), description="online settings: reset_each_shift, continual, mixed_domains, correlated, ..."
    )
    replicates: int = Field(default=1000, ge=0, description="bootstrap resamples of the confidence intervals; 0: none")
    image_size: int | None = Field(default=None, ge=8, le=2048, description="side in pixels; null: as it was trained")
    official_rxrx1: bool = Field(default=False, description="random rotations in evaluation, as the official code has")
    batch_size: int = Field(default=128, ge=1, description="images per forward pass; moves the last bits")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values)

    @model_validator(mode="after")
    def _fits(self) -> EvaluateConfig:
        outside = [size for size in self.curve if not 0 <= size <= self.support]
        if outside:
            raise ValueError(
                f"curve={list(self.curve)}: a domain is adapted on at most support={self.support} images, so "
                f"{outside[0]} would not be what it says; use sizes from 0 to {self.support}, or raise support."
            )
        for owner, kinds in self.adaptations.items():
            for name, options in kinds.items():
                if options.get("reset") is not None:
                    raise ValueError(
                        f"adaptations.{owner}.{name}.reset has no effect in an evaluation: the names of `streams` say "
                        "when a model is reset; leave it out."
                    )
        return self


class Stage(StageBase[EvaluateConfig]):
    """Adapt to every unseen domain and score all methods."""

    output: ClassVar[str] = "metrics"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "erm": Port("model", optional=True, also=NETWORKS, doc="the baseline"),
        "student": Port("student", optional=True, doc="the meta-distilled student with its aggregator"),
        "aggregator": Port("aggregator", optional=True, doc="the pre-trained aggregator, scored as a classifier"),
        "experts": Port("model", many=True, optional=True, doc="for rows whose features are not cached"),
        "features": Port("features", many=True, optional=True, doc="the experts' cached features"),
        "oracle": Port("model", optional=True, also=NETWORKS, doc="saw labels of the test domains: the ceiling"),
    }
    Config: ClassVar[type[StageConfig]] = EvaluateConfig

    def code(self, config: EvaluateConfig) -> list[str]:
        """The adaptation methods that are named."""
        from moe.adaptation.base import ADAPTATIONS

        return sorted({ADAPTATIONS.module_name(name) for kinds in config.adaptations.values() for name in kinds})

    def run(self, config: EvaluateConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``evaluation.json`` and the logits; ``meta`` has the scores by method."""
        from workers.data import open_data
        from workers.evaluate_member import EvaluateSettings, evaluate_member

        data = open_data(context.inputs["data"][0], context.data_root)
        settings = EvaluateSettings(**config.model_dump(exclude={"preset"}))
        return evaluate_member(data, settings, context)
