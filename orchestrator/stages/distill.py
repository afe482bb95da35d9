"""``distill``: meta-distillation of the experts into one adaptable student (Meta-DMoE, section 3.5).

A gang stage: under the Ray executor it is a Ray Train job whose ranks run DeepSpeed, data-parallel over domain episodes
and expert-parallel over the student's MoE block; inline it is a call in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from orchestrator.stages._presets import fill_preset
from orchestrator.stages.base import NETWORKS, Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.distill_settings import DistillSettings


class DistillConfig(StageConfig):
    """How the distillation is run."""

    preset: str | None = Field(default=None, description="algorithm/dataset/part whose settings to start from")
    split: str = Field(default="train", description="split that episodes are drawn from")
    training: DistillSettings = Field(description="episodes, inner step, rates, MoE block, engine")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values)


class Stage(StageBase[DistillConfig]):
    """Meta-distil the experts into one adaptable student."""

    version: ClassVar[int] = 2
    output: ClassVar[str] = "student"
    changeable: ClassVar[Sequence[str]] = (
        "training.student_lr",
        "training.aggregator_lr",
        "training.rates_lr",
        "training.weight_decay",
        "training.clip",
        "training.schedule",
        "training.aggregator_schedule",
        "training.decay",
        "training.warmup_epochs",
        "training.meta.inner_lr",
        "training.moe.balance_weight",
    )
    gang: ClassVar[bool] = True
    modules: ClassVar[Sequence[str]] = ("workers.distill_job", "deepspeed", "torch._dynamo")
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "groups": Port("groups", doc="who owns which domains"),
        "features": Port("features", many=True, doc="features of all experts, in expert order"),
        "aggregator": Port("aggregator", doc="the pre-trained aggregator"),
        "student": Port("model", also=NETWORKS, doc="the pre-trained student"),
    }
    Config: ClassVar[type[StageConfig]] = DistillConfig

    def run(self, config: DistillConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``model.safetensors``, ``aggregator.safetensors`` and ``distill.json``."""
        from workers.data import open_data
        from workers.distill_job import DistillJob, StoredModel, distill, distilled_meta
        from workers.segments import segment_of
        from workers.transforms import recorded, transform_after

        def stored(port: str) -> StoredModel:
            artifact = context.inputs[port][0]
            return StoredModel(path=str(artifact.path), meta=dict(artifact.meta))

        data = context.inputs["data"][0]
        info = open_data(data, context.data_root).info  # refuses changed files before any rank is started
        student = stored("student")
        settings = config.training
        if settings.image_size is None:
            settings = settings.model_copy(update={"image_size": student.meta.get("image_size")})
        segment = segment_of(member.params, context.inputs)
        job = DistillJob(
            dataset=data.meta["dataset"],
            options=data.meta["options"],
            data_root=str(context.data_root),
            split=config.split,
            student=student,
            aggregator=stored("aggregator"),
            features=[str(artifact.path) for artifact in context.inputs["features"]],
            groups=context.inputs["groups"][0].meta["groups"],
            settings=settings,
            seed=context.seed,
            threads=context.threads,
            scratch=str(context.scratch),
            output=str(context.output),
            until=None if segment is None else segment.until,
            start=None if segment is None or segment.start is None else str(segment.start),
        )
        context.train(distill, job.model_dump(mode="json"))
        meta = distilled_meta(job)
        context.metrics({f"val/{name}": value for name, value in meta["scores"].items()}, step=meta["step"])
        evaluation = transform_after(student.meta, info, settings.image_size, train=False)
        return {**meta, "image_size": settings.image_size, **recorded(student.meta, evaluation)}
