"""``train``: supervised training of one network, or of one per group of domains (the experts of a fan-out)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from moe.errors import SpecError
from moe.specs import BackboneSpec
from orchestrator.stages._presets import fill_preset
from orchestrator.stages._rows import rows_in
from orchestrator.stages.base import NETWORKS, Member, Port, StageBase, StageConfig
from workers.algorithm_options import make_algorithm
from workers.context import Context
from workers.settings import AlgorithmBlock, TrainSettings


class TrainConfig(StageConfig):
    """What is trained on which rows."""

    preset: str | None = Field(default=None, description="algorithm/dataset/part whose settings to start from")
    backbone: BackboneSpec = Field(description="the network; its head is fresh, unless `init` is wired")
    training: TrainSettings = Field(description="optimiser, length, validation")
    algorithm: AlgorithmBlock | None = Field(
        default=None, description="loss, network and updates of an algorithm (gmoe, emoe, coral ...); null: plain ERM"
    )
    splits: tuple[str, ...] = Field(default=("train",), min_length=1, description="splits whose rows are trained on")
    val_split: str = Field(default="val", description="split that selects the state")
    groups: int = Field(default=1, ge=1, le=100_000, description="groups of domains, one network each (experts)")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values)

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.algorithm is None:
            return self
        if self.training.micro_batch is not None:
            raise ValueError("micro_batch cannot be combined with an algorithm, whose updates see the whole batch.")
        if self.training.head_lr is not None:
            raise ValueError("head_lr cannot be combined with an algorithm, which has parameter groups of its own.")
        try:
            method = make_algorithm(self.algorithm, self.backbone, self.training)
        except SpecError as error:
            raise ValueError(f"{error.message} {error.hint}".strip()) from None
        if self.training.ema_decay is not None and method.averaging() is not None:
            raise ValueError(f"ema_decay cannot be combined with {self.algorithm.name}, which averages the weights.")
        return self


class Stage(StageBase[TrainConfig]):
    """Train a classifier on all rows, or one per group of domains."""

    version: ClassVar[int] = 2
    output: ClassVar[str] = "model"
    changeable: ClassVar[Sequence[str]] = (
        "training.lr",
        "training.head_lr",
        "training.weight_decay",
        "training.clip",
        "training.schedule",
        "training.decay",
        "training.warmup_epochs",
        "algorithm.options.dropout",
        "algorithm.options.drop_path",  # emoe
        "algorithm.options.penalty",  # irm
        "algorithm.options.gamma",  # coral
        "algorithm.options.meta_lr",  # fish
    )
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "groups": Port("groups", optional=True, doc="who owns which domains; needed when groups is above 1"),
        "init": Port("model", optional=True, also=NETWORKS, doc="start from this network (a shared or pretrained one)"),
    }
    Config: ClassVar[type[StageConfig]] = TrainConfig

    def members(self, config: TrainConfig) -> list[Member]:
        """One member per group of domains."""
        if config.groups == 1:
            return [Member()]
        return [Member(f"group={i}", {"group": i}) for i in range(config.groups)]

    def code(self, config: TrainConfig) -> list[str]:
        """The algorithm that is named."""
        from moe.algorithms.base import ALGORITHMS

        return [] if config.algorithm is None else [ALGORITHMS.module_name(config.algorithm.name)]

    def external(self, config: TrainConfig, data_root: str) -> Mapping[str, str]:
        """The pretrained weights, so that a replaced file trains anew."""
        from workers.packaged_weights import weights_digest

        digest = weights_digest(config.backbone.name, config.backbone.pretrained, Path(data_root))
        return {"weights": digest} if digest else {}

    def weigh(self, config: TrainConfig, member: Member, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
        """Training rows: those of the group's domains (``split`` counts them in its ``meta``), or all."""
        group = member.params.get("group")
        if group is None:
            return rows_in(inputs, config.splits, member.weight)
        rows = [count for groups in inputs.get("groups", ()) for count in groups.get("rows", ())]
        return float(rows[group]) if group < len(rows) else member.weight

    def run(self, config: TrainConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Train and write ``model.safetensors``; ``meta`` has the scores and, for an expert, its domains."""
        from workers.data import open_data
        from workers.segments import segment_of
        from workers.supervised import expert_domains, train_member

        data = open_data(context.inputs["data"][0], context.data_root)
        groups, init = context.inputs.get("groups", ()), context.inputs.get("init", ())
        domains = expert_domains(groups[0] if groups else None, config.groups, member.params.get("group"))
        return train_member(
            data,
            config.backbone,
            config.training,
            context,
            splits=config.splits,
            val_split=config.val_split,
            domains=domains,
            init=init[0] if init else None,
            algorithm=config.algorithm,
            segment=segment_of(member.params, context.inputs),
        )
