"""How to train one network: the settings shared by every supervised stage, free of torch.

The same model is the ``training:`` block of the YAML and the argument of :func:`workers.train_model.train_model`, so
there is one place where a setting is named, bounded and described.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainSettings(BaseModel):
    """Supervised training; the length is given in ``epochs`` or in ``steps``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batch_size: int = Field(ge=1, description="images per update")
    epochs: int | None = Field(default=None, ge=1, description="passes over the rows")
    steps: int | None = Field(default=None, ge=1, description="updates; instead of epochs, or an upper bound to them")
    lr: float = Field(gt=0, description="base learning rate")
    head_lr: float | None = Field(default=None, gt=0, description="rate of the last layer; lr when null")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 (Adam, SGD) or decoupled (AdamW)")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(default="adam", description="sgd has momentum 0.9")
    schedule: Literal["exponential", "cosine", "constant", "onecycle"] = Field(
        default="exponential", description="exponential: per epoch; cosine: warm-up, per step; onecycle: 10% warm-up"
    )
    decay: float = Field(default=0.96, gt=0, le=1, description="factor per epoch of the exponential schedule")
    warmup_epochs: int = Field(default=10, ge=0, description="of the cosine schedule")
    sampling: Literal["rows", "domains", "balanced"] = Field(
        default="rows",
        description="rows: shuffled epochs; domains: every domain equally likely, whatever its size; balanced: as many "
        "rows of every domain in every batch",
    )
    micro_batch: int | None = Field(default=None, ge=1, description="split a batch into pieces of so many (memory)")
    clip: float | None = Field(default=None, gt=0, description="largest gradient norm")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast; weights stay fp32")
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="average the weights with this decay")
    cadence: Literal["official", "halves", "epoch", "steps"] = Field(
        default="official",
        description="when to validate: multiples of half an epoch but 0, middle and end, end, or evaluate_every",
    )
    evaluate_every: int = Field(default=100, ge=1, description="updates between validations under cadence steps")
    select: Literal["best", "last"] = Field(default="best", description="best validation state, or the last one")
    parity: Literal["official", "fixed"] = Field(
        default="fixed", description="official: a state is only selected when its score exceeds 0"
    )
    patience: int | None = Field(default=None, ge=1, description="validations without improvement before stopping")
    checkpoint_every: int = Field(
        default=200, ge=1, description="updates between checkpoints", json_schema_extra={"cache": False}
    )
    drop_last: bool = Field(default=False, description="leave out the short last batch of an epoch")
    image_size: int | None = Field(default=None, ge=8, le=2048, description="side in pixels; null: the official size")
    eval_batch_size: int = Field(default=128, ge=1, description="images per forward pass of validations")
    loader_threads: int = Field(default=0, ge=0, description="decoding threads", json_schema_extra={"cache": False})
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")

    @model_validator(mode="after")
    def _length(self) -> TrainSettings:
        if self.epochs is None and self.steps is None:
            raise ValueError("give epochs or steps")
        if self.drop_last and self.sampling != "rows":
            raise ValueError(f"drop_last=true has no meaning for sampling={self.sampling}, whose batches are all full.")
        return self


class AlgorithmBlock(BaseModel):
    """Which algorithm of ``moe/algorithms`` makes the loss, the network and the updates of a supervised stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="file of moe/algorithms, e.g. gmoe, emoe, fish, coral, irm, swad (`moepipe ls algorithms`)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="fields of the algorithm's Config; backbone and train come from the stage"
    )
