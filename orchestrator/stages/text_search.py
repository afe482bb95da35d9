"""``text_search``: method x tuning x experts x learning rate on one task, every run a member of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.text_settings import Job, SearchSettings, TextSource, fill_text_preset


class TextSearchConfig(StageConfig, SearchSettings):
    """The runs of a search."""

    preset: str | None = Field(
        default=None, description="GLUE task whose published rates, epochs and experts to start from, e.g. rte"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_text_preset(values, cls.model_fields)

    def settings(self) -> SearchSettings:
        """The settings without what only the stage knows."""
        return SearchSettings(**{name: getattr(self, name) for name in SearchSettings.model_fields})


def weights_digest(source: TextSource, data_root: str) -> Mapping[str, str]:
    """The pretrained weights, so that a replaced file trains anew."""
    if source.weights is None:
        return {}
    from workers.text_models import source_digest

    return {"weights": source_digest(source, Path(data_root))}


class Stage(StageBase[TextSearchConfig]):
    """Tune text classifiers: dense, GMoE, EMoE and its variants, in full or by low-rank adapters."""

    output: ClassVar[str] = "text_model"
    inputs: ClassVar[Mapping[str, Port]] = {
        "tokens": Port("tokens", doc="the encoded texts"),
        "split": Port("text_split", optional=True, doc="clusters made once; without it every run makes its own"),
    }
    Config: ClassVar[type[StageConfig]] = TextSearchConfig

    def members(self, config: TextSearchConfig) -> list[Member]:
        """One member per run."""
        return [Member(job.name, job.model_dump(mode="json")) for job in config.jobs()]

    def narrow(self, config: TextSearchConfig, member: Member) -> TextSearchConfig:
        """The settings without the other runs."""
        job = Job(**member.params)
        phase = config.phase(job.tuning).model_copy(update={"learning_rates": (job.lr,)})
        other = "lora" if job.tuning == "full" else "full"
        changes: dict[str, Any] = {
            "methods": (job.method,),
            "tunings": (job.tuning,),
            job.tuning: phase,
            other: TextSearchConfig.model_fields[other].get_default(call_default_factory=True),
        }
        sizes = ((job.num_experts,), (job.top_k,)) if job.num_experts else ((), ())
        changes |= dict(zip(("num_experts", "top_k"), sizes, strict=True))
        return config.model_copy(update=changes)

    def external(self, config: TextSearchConfig, data_root: str) -> Mapping[str, str]:
        """The pretrained weights."""
        return weights_digest(config.model, data_root)

    def run(self, config: TextSearchConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Train and write the selected state; ``meta`` has its scores and how it was converted."""
        from workers.text_train import search_member

        return search_member(config.settings(), Job(**member.params), context)
