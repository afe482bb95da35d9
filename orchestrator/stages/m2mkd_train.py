"""``m2mkd_train``: a whole network of m2mKD: meta model, deep modules inside it, teacher, final model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages._m2mkd import TrainingConfig, file_digests, missing_files
from orchestrator.stages.base import Member, Port, StageBase
from workers.context import Context
from workers.m2mkd_settings import PACKAGED, PACKAGED_DEPTH, packaged_problem


class M2mkdTrainConfig(TrainingConfig):
    """Which phase, and from what it starts."""

    phase: Literal["pt", "mt", "ft", "e2e"] = Field(
        description="pt: meta model; mt: one deep module per member; ft: assembled teacher; e2e: modular model"
    )
    take: tuple[str, ...] = Field(
        default=(),
        description="weights to start from. pt, mt, ft: one whole network, one module file per stage, or "
        "vit_small_focus (mt takes the module of its position); e2e: a finished model. With epochs 0 they are used as "
        "they are",
    )
    fresh_head: bool = Field(default=False, description="leave the head in `take` out: it has other classes")
    take_blocks: tuple[int, ...] = Field(
        default=(),
        description="pt, ft: of one deeper network under `take`, the blocks that are taken, from 0, one for each "
        "block of this network",
    )
    label: str = Field(default="", description="name in tables")
    engine: Literal["torch", "deepspeed"] = Field(
        default="torch", description="what drives resources.workers ranks: summed gradients, or DeepSpeed ZeRO"
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=1, description="what DeepSpeed divides over ranks", json_schema_extra={"cache": False}
    )
    ep_size: int = Field(
        default=1,
        ge=1,
        description="ranks that share the experts under DeepSpeed",
        json_schema_extra={"cache": False},
    )

    @model_validator(mode="after")
    def _files(self) -> M2mkdTrainConfig:
        if self.take_blocks and self.phase not in ("pt", "ft"):
            raise ValueError(f"take_blocks: phase {self.phase} takes no blocks of its own choice; leave them out.")
        spec = self.method.meta if self.phase == "pt" else self.method.teacher
        if PACKAGED in self.take and self.phase != "e2e":
            whole = spec.model_copy(update={"depths": (PACKAGED_DEPTH,)}) if self.take_blocks else spec
            if problem := packaged_problem(whole):
                raise ValueError(f"take: {problem}")
        if self.fresh_head and (not self.take or self.phase == "mt"):
            raise ValueError("fresh_head: it is about a file of pt, ft or e2e (`take`).")
        if self.phase == "e2e" and len(self.take) > 1:
            raise ValueError("take: a finished model is one file; student modules go to m2mkd_assemble (`files`).")
        stages = len(self.method.meta.depths if self.phase == "pt" else self.method.teacher.depths)
        if len(self.take) not in (0, 1, stages):
            raise ValueError(f"take: {len(self.take)} files for {stages} stages; give one, or one per stage.")
        if self.ep_size > 1 and self.engine == "torch":
            raise ValueError(f"ep_size={self.ep_size} needs engine: deepspeed; torch keeps all experts on every rank.")
        experts = self.method.vmoe.num_experts if self.method.vmoe is not None else 0
        if self.ep_size > 1 and (self.phase != "e2e" or experts % self.ep_size):
            raise ValueError(f"ep_size={self.ep_size} does not divide {experts} experts of a model of phase e2e.")
        if len(set(self.take)) != len(self.take):
            raise ValueError("take: a module file is there twice.")
        depth = sum(self.method.teacher.depths if self.phase == "ft" else self.method.meta.depths)
        if self.take_blocks and (len(self.take) != 1 or len(self.take_blocks) != depth):
            raise ValueError(
                f"take_blocks: {len(self.take_blocks)} blocks of {len(self.take)} files for a network of {depth} "
                "blocks; give one file and one of its blocks for each block."
            )
        return self


class Stage(StageBase[M2mkdTrainConfig]):
    """Train a network of m2mKD, or one deep teacher module per position."""

    output: ClassVar[str] = "m2mkd_network"
    gang: ClassVar[bool] = True
    modules: ClassVar[Sequence[str]] = ("workers.m2mkd_job", "timm")
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

    def examine(self, config: M2mkdTrainConfig) -> Sequence[tuple[tuple[str | int, ...], str, str]]:
        """Files that are not there, told before any earlier stage is run."""
        return missing_files("take", config.take)

    def external(self, config: M2mkdTrainConfig, data_root: str) -> Mapping[str, str]:
        """The files that it starts from."""
        return file_digests(config.take, data_root)

    def run(self, config: M2mkdTrainConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the weights; ``meta`` has spec, scores and history."""
        from workers.m2mkd_job import train_on_ranks

        position = member.params.get("position")
        settings = replace(
            config.run_settings(),
            take_blocks=config.take_blocks,
            fresh_head=config.fresh_head,
            engine=config.engine,
            zero_stage=config.zero_stage,
            ep_size=config.ep_size,
        )
        return train_on_ranks(config.method, config.phase, position, settings, config.take, config.label, context)
