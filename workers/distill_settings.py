"""How to meta-distil, free of torch: the ``training:`` block of the stage, and the job that every rank receives.

Defaults are Meta-DMoE's (arXiv 2210.03885, public code) where it has one.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.specs import MetaStepSpec, StudentMoESpec


class DistillSettings(BaseModel):
    """Meta-distillation of the experts into the student; the length is given in ``epochs`` or in ``steps``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    meta: MetaStepSpec = Field(description="inner step, order of the gradient, exclusion, precision")
    student_lr: float = Field(gt=0, description="rate beta_s of student and head")
    aggregator_lr: float = Field(gt=0, description="rate beta_t of the aggregator")
    rates_lr: float = Field(default=1e-3, gt=0, description="rate of the learned inner rates (meta.learn_rates)")
    support: int = Field(ge=1, description="images of an episode that the inner step adapts on")
    query: int = Field(ge=1, description="images of an episode that the loss is taken on")
    epochs: int | None = Field(default=None, ge=1, description="epochs of floor(rows / images per step) steps")
    steps: int | None = Field(default=None, ge=1, description="steps; instead of epochs, or an upper bound to them")
    tasks_per_step: int = Field(default=1, ge=1, description="domain episodes per update, divided over the ranks")
    episodes: Literal["official", "disjoint"] = Field(
        default="official", description="disjoint: support and query never share an image in small domains"
    )
    moe: StudentMoESpec | None = Field(default=None, description="give the student an MoE block; null: dense")
    engine: Literal["auto", "torch", "deepspeed"] = Field(
        default="auto", description="auto: deepspeed when it can be imported, else torch, said in the log"
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=1, description="what DeepSpeed divides over ranks", json_schema_extra={"cache": False}
    )
    ep_size: int = Field(
        default=1, ge=1, description="ranks that share the block's experts", json_schema_extra={"cache": False}
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(default="adam", description="sgd has momentum 0.9")
    weight_decay: float = Field(
        default=0.0, ge=0, description="L2 (Adam, SGD) or decoupled (AdamW); not of learned rates"
    )
    schedule: Literal["exponential", "cosine", "constant"] = Field(
        default="exponential", description="exponential: per epoch; cosine: warm-up over warmup_epochs, per step"
    )
    aggregator_schedule: Literal["same", "constant"] = Field(
        default="same", description="constant is the official choice for rxrx1"
    )
    decay: float = Field(default=0.96, gt=0, le=1, description="factor per epoch of the exponential schedule")
    warmup_epochs: int = Field(default=1, ge=0, description="of the cosine schedule")
    reset_optimizer: bool = Field(
        default=True, description="forget Adam's moments at every epoch, as the official code does (but for rxrx1)"
    )
    clip: float | None = Field(default=None, gt=0, description="largest gradient norm")
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="average the weights with this decay")
    validate_on: str | None = Field(default="val", description="split to select on; null: take the last state")
    cadence: Literal["halves", "epoch", "steps"] = Field(
        default="halves", description="when to validate: middle and end of each epoch, end, or evaluate_every"
    )
    evaluate_every: int = Field(default=100, ge=1, description="steps between validations under cadence steps")
    validation_rows: int | None = Field(
        default=None, ge=1, description="score at most so many rows of each validation domain; null: all"
    )
    select: Literal["best", "last"] = Field(default="best", description="best validation state, or the last one")
    parity: Literal["official", "fixed"] = Field(
        default="fixed", description="official: a state is only selected when its score exceeds 0"
    )
    patience: int | None = Field(default=None, ge=1, description="validations without improvement before stopping")
    checkpoint_every: int = Field(
        default=50, ge=1, description="steps between checkpoints", json_schema_extra={"cache": False}
    )
    image_size: int | None = Field(default=None, ge=8, le=2048, description="side in pixels; null: the official size")
    fast_second_order: bool = Field(
        default=True, description="fold frozen BatchNorms, cheaper double backward; same gradients up to rounding"
    )
    channels_last: bool = Field(default=False, description="memory layout of images; faster with bf16 on a CPU")
    eval_batch_size: int = Field(default=128, ge=1, description="images per forward pass of validations")
    loader_threads: int = Field(default=0, ge=0, description="decoding threads", json_schema_extra={"cache": False})
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")

    @model_validator(mode="after")
    def _length(self) -> DistillSettings:
        if self.epochs is None and self.steps is None:
            raise ValueError("give epochs or steps")
        if self.moe is not None and self.moe.num_experts % self.ep_size:
            raise ValueError(f"moe.num_experts={self.moe.num_experts} is not a multiple of ep_size={self.ep_size}")
        return self

    @model_validator(mode="after")
    def _effective(self) -> DistillSettings:
        fields, block = type(self).model_fields, self.moe
        if self.rates_lr != fields["rates_lr"].default and not self.meta.learn_rates:
            raise ValueError(f"rates_lr={self.rates_lr} has no effect without meta.learn_rates; leave it out")
        if self.validate_on is None:
            for name in ("patience", "validation_rows"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} has no effect without validate_on; leave it out")
        if block is not None and block.dropless:
            default = StudentMoESpec.model_fields["capacity_factor"].default
            if block.capacity_factor != default:
                raise ValueError(
                    f"moe.capacity_factor={block.capacity_factor} has no effect while moe.dropless is true; set it to "
                    "false, or leave capacity_factor out"
                )
        return self


class StoredModel(BaseModel):
    """An artifact on disk: its folder and the record that its stage wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="folder of the artifact")
    meta: dict[str, Any] = Field(description="its JSON record")


class DistillJob(BaseModel):
    """Everything a rank needs, as JSON. ``context.train(distill, job.model_dump(mode="json"))``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="registry name")
    options: dict[str, Any] = Field(default_factory=dict, description="the data set's options")
    data_root: str = Field(description="folder with prepared data sets")
    split: str = Field(default="train", description="rows to draw episodes from")
    student: StoredModel = Field(description="the pre-trained student (form classifier or student)")
    aggregator: StoredModel = Field(description="the pre-trained aggregator")
    features: list[str] = Field(min_length=1, description="feature folders of the experts, in expert order")
    groups: list[list[int]] = Field(description="domains of each expert, in expert order (the domain split)")
    settings: DistillSettings = Field(description="how to train")
    seed: int = Field(description="the only source of randomness")
    threads: int = Field(default=1, ge=1, description="compute threads of each rank")
    scratch: str = Field(description="folder that survives crashes; every rank can read it")
    output: str = Field(description="folder of the result; rank 0 writes")
    until: int | None = Field(default=None, description="train a segment only: updates after which it ends")
    start: str | None = Field(default=None, description="folder with the state that a segment goes on from")
