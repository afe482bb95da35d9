"""``m2mkd_evaluate``: finished models on splits in and out of domain, and few-shot episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from orchestrator.stages._m2mkd import MethodConfig
from orchestrator.stages.base import Member, Port, StageBase
from workers.context import Context
from workers.m2mkd_settings import FewShot


class M2mkdEvaluateConfig(MethodConfig):
    """On what."""

    splits: tuple[str, ...] = Field(default=("test",), min_length=1, description="splits that are scored")
    few_shot: FewShot | None = Field(default=None, description="episodes with a fresh head; null: none")
    draws: int = Field(
        default=1, ge=1, description="evaluations of a circuit whose mean is reported, where parity is official"
    )
    batch_size: int = Field(
        default=128,
        ge=1,
        description="images per forward pass; moves the last bits. With parity official a V-MoE's or ViT's last "
        "incomplete batch is not scored",
    )

    @model_validator(mode="after")
    def _draws(self) -> M2mkdEvaluateConfig:
        if self.draws > 1 and self.method.parity != "official":
            raise ValueError(f"draws={self.draws} has no effect: without method.parity official nothing is drawn.")
        return self


class Stage(StageBase[M2mkdEvaluateConfig]):
    """Score modular models."""

    output: ClassVar[str] = "m2mkd_metrics"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "ood": Port("data", many=True, optional=True, doc="sets with some of the classes, scored on their `test`"),
        "models": Port("m2mkd_network", many=True, doc="what is compared, each with its label"),
    }
    Config: ClassVar[type[M2mkdEvaluateConfig]] = M2mkdEvaluateConfig

    def members(self, config: M2mkdEvaluateConfig) -> list[Member]:
        """One member."""
        return [config.member("fs")]

    def run(self, config: M2mkdEvaluateConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``evaluation.json``; ``meta`` has the selection metric by model and split."""
        from workers.m2mkd_evaluate import evaluate_member

        return evaluate_member(config.method, config.splits, config.few_shot, config.batch_size, context, config.draws)
