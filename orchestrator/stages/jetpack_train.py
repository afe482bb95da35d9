"""``jetpack_train``: fine-tune every start by MoE Jetpack's recipe, and record accuracy at fixed updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.jetpack_settings import RecipeSettings, fill_jetpack_preset


class JetpackTrainConfig(StageConfig, RecipeSettings):
    """The recipe."""

    preset: str | None = Field(
        default=None, description="data set of the paper (cifar100, pets-paper, ...) whose recipe to start from"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_jetpack_preset(values, RecipeSettings.model_fields)

    def settings(self) -> RecipeSettings:
        """The settings without what only the stage knows."""
        return RecipeSettings(**{name: getattr(self, name) for name in RecipeSettings.model_fields})


class Stage(StageBase[JetpackTrainConfig]):
    """Fine-tune the starts of a recycle stage, one member each."""

    output: ClassVar[str] = "jetpack_run"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "start": Port("jetpack_start", doc="where to begin; members match those of the recycle stage"),
    }
    Config: ClassVar[type[StageConfig]] = JetpackTrainConfig

    def members(self, config: JetpackTrainConfig) -> list[Member]:
        """One member per start, named as in the recycle stage."""
        return [Member(f"start={name}") for name in config.starts]

    def narrow(self, config: JetpackTrainConfig, member: Member) -> JetpackTrainConfig:
        """The recipe without the other starts."""
        own = member.name.removeprefix("start=")
        return config.model_copy(update={"starts": (own,), "save_model": config.keeps(own)})

    def weigh(self, config: JetpackTrainConfig, member: Member, inputs: Mapping[str, Any]) -> float:
        """Parameters of the network."""
        return float(next((meta["parameters"] for meta in inputs.get("start", ())), member.weight))

    def run(self, config: JetpackTrainConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``curve.json`` and perhaps ``model.safetensors``."""
        from workers.jetpack_train import train_member

        return train_member(config.settings(), context)
