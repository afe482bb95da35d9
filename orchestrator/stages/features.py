"""``features``: what frozen experts say about the rows, computed once and memory-mapped by every later stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages._presets import fill_preset
from orchestrator.stages._rows import rows_in
from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class FeaturesConfig(StageConfig):
    """Which rows, and how they are stored."""

    preset: str | None = Field(default=None, description="algorithm/dataset/part whose settings to start from")
    groups: int = Field(default=1, ge=1, le=100_000, description="experts in the fan-out, as in the train stage")
    splits: tuple[str, ...] = Field(default=("train", "val"), min_length=1, description="splits that are stored")
    dtype: Literal["float32", "float16"] = Field(default="float32", description="float16 halves the files")
    image_size: int | None = Field(default=None, ge=8, le=2048, description="side in pixels; null: as it was trained")
    batch_size: int = Field(default=128, ge=1, description="images per forward pass; moves the last bits")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the forward passes")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values)


class Stage(StageBase[FeaturesConfig]):
    """Features of frozen networks, one member per network."""

    version: ClassVar[int] = 2
    output: ClassVar[str] = "features"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "model": Port("model", doc="the frozen network; members match those of the train stage"),
    }
    Config: ClassVar[type[StageConfig]] = FeaturesConfig

    def members(self, config: FeaturesConfig) -> list[Member]:
        """One member per expert, named as in the train stage."""
        if config.groups == 1:
            return [Member()]
        return [Member(f"group={i}", {"group": i}) for i in range(config.groups)]

    def weigh(self, config: FeaturesConfig, member: Member, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
        """Rows to store: every expert looks at all of them, whatever it was trained on."""
        return rows_in(inputs, config.splits, member.weight)

    def run(self, config: FeaturesConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the feature folder of one expert into the artifact."""
        from workers.data import open_data
        from workers.expert_features import expert_features

        data = open_data(context.inputs["data"][0], context.data_root)
        return expert_features(
            data,
            context.inputs["model"][0],
            context,
            splits=config.splits,
            image_size=config.image_size,
            batch_size=config.batch_size,
            dtype=config.dtype,
            precision=config.precision,
        )
