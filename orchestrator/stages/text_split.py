"""``text_split``: cluster the neurons of the converted layers once, and report how modular the layers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from orchestrator.stages.text_search import weights_digest
from workers.context import Context
from workers.text_settings import SplitSettings, fill_text_preset


class TextSplitConfig(StageConfig, SplitSettings):
    """What is split, and what is measured; give it what the search has."""

    preset: str | None = Field(default=None, description="GLUE task whose published experts to start from, e.g. rte")
    measured: Literal["converted", "all", "none"] = Field(
        default="converted", description="layers of the modularity report; SwiGLU layers are not measured"
    )
    texts: int = Field(default=64, ge=1, le=100_000, description="training rows whose tokens it is measured on")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_text_preset(values, cls.model_fields)

    def settings(self) -> SplitSettings:
        """The settings without what only the stage knows."""
        return SplitSettings(**{name: getattr(self, name) for name in SplitSettings.model_fields})


class Stage(StageBase[TextSplitConfig]):
    """Experts by balanced clustering, shared by all runs, and the modularity report before any tuning."""

    output: ClassVar[str] = "text_split"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {"tokens": Port("tokens", doc="the encoded texts")}
    Config: ClassVar[type[StageConfig]] = TextSplitConfig

    def external(self, config: TextSplitConfig, data_root: str) -> Mapping[str, str]:
        """The pretrained weights."""
        return weights_digest(config.model, data_root)

    def run(self, config: TextSplitConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the labels, ``modularity.json`` and the activations of the figure."""
        from workers.text_split import split_member

        return split_member(config.settings(), config.measured, config.texts, context)
