"""``m2mkd_train``: a whole network of m2mKD: meta model, deep modules inside it, teacher, final model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages._m2mkd import TrainingConfig, file_digests
from orchestrator.stages.base import Member, Port, StageBase
from workers.context import Context


class M2mkdTrainConfig(TrainingConfig):
    """Which phase, and from what it starts."""

    phase: Literal["pt", "mt", "ft", "e2e"] = Field(
        description="pt: meta model; mt: one deep module per member; ft: assembled teacher; e2e: modular model"
    )
    take: tuple[str, ...] = Field(
        default=(),
        description="pt, ft: weights to start from: one whole network, one module file per stage, or vit_small_focus; "
        "with epochs 0 they are used as they are",
    )
    label: str = Field(default="", description="name in tables")

    @model_validator(mode="after")
    def _files(self) -> M2mkdTrainConfig:
        if self.take and self.phase not in ("pt", "ft"):
            raise ValueError(f"take: phase {self.phase} does not start from files; use it in pt or ft.")
        stages = len(self.method.teacher.depths if self.phase == "ft" else self.method.meta.depths)
        if len(self.take) not in (0, 1, stages):
            raise ValueError(f"take: {len(self.take)} files for {stages} stages; give one, or one per stage.")
        if len(set(self.take)) != len(self.take):
            raise ValueError("take: a module file is there twice.")
        return self


class Stage(StageBase[M2mkdTrainConfig]):
    """Train a network of m2mKD, or one deep teacher module per position."""

    output: ClassVar[str] = "m2mkd_network"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "init": Port(
            "m2mkd_network",
            many=True,
            optional=True,
            doc="mt: the meta model; ft: the modules of mt, or a network; e2e: the assembled model",
        ),
    }
    Config: ClassVar[type[M2mkdTrainConfig]] = M2mkdTrainConfig

    def members(self, config: M2mkdTrainConfig) -> list[Member]:
        """One member; in phase mt one per module."""
        return config.positions("mt") if config.phase == "mt" else [config.member(config.phase)]

    def external(self, config: M2mkdTrainConfig, data_root: str) -> Mapping[str, str]:
        """The files that it starts from."""
        return file_digests(config.take, data_root)

    def run(self, config: M2mkdTrainConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the weights; ``meta`` has spec, scores and history."""
        from workers.m2mkd_train import train_member

        position = member.params.get("position")
        settings = config.run_settings()
        return train_member(config.method, config.phase, position, settings, config.take, config.label, context)
