"""``aggregate``: pre-train the aggregator as a classifier over all frozen experts (Meta-DMoE, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from moe.algorithms.meta_dmoe import AggregatorSpec
from orchestrator.stages._presets import fill_preset
from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.settings import TrainSettings


class AggregateConfig(StageConfig):
    """The aggregator's size and its training."""

    preset: str | None = Field(default=None, description="algorithm/dataset/part whose settings to start from")
    aggregator: AggregatorSpec = Field(default_factory=AggregatorSpec, description="depth, heads, width, pooling")
    training: TrainSettings = Field(description="optimiser, length, validation")
    splits: tuple[str, ...] = Field(default=("train",), min_length=1, description="splits whose rows are trained on")
    val_split: str = Field(default="val", description="split that selects the state")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values)

    @model_validator(mode="after")
    def _fits(self) -> AggregateConfig:
        for name in ("head_lr", "micro_batch", "image_size"):
            if getattr(self.training, name) is not None:
                raise ValueError(
                    f"training.{name} has no effect on the aggregator, which reads cached features at one rate; leave "
                    "it out."
                )
        return self


class Stage(StageBase[AggregateConfig]):
    """Pre-train the aggregator on the experts' features."""

    output: ClassVar[str] = "aggregator"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "features": Port("features", many=True, doc="features of all experts, in expert order"),
        "student": Port("model", optional=True, doc="classify with this network's head instead of an own one"),
    }
    Config: ClassVar[type[StageConfig]] = AggregateConfig

    def run(self, config: AggregateConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``aggregator.safetensors``; ``meta`` has its size and validation scores."""
        from workers.aggregate_member import train_aggregator_member
        from workers.data import open_data

        data = open_data(context.inputs["data"][0], context.data_root)
        student = context.inputs.get("student", ())
        return train_aggregator_member(
            data,
            context.inputs["features"],
            config.aggregator,
            config.training,
            context,
            splits=config.splits,
            val_split=config.val_split,
            head_of=student[0] if student else None,
        )
