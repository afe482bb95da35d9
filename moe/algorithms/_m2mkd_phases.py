"""How one phase of m2mKD trains: a torch-free record, its learning rates by epoch, and its augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from moe.algorithms.base import Settings

if TYPE_CHECKING:
    from timm.scheduler import CosineLRScheduler
    from torch.optim import Optimizer


class Phase(Settings):
    """Optimiser, schedule and regularisation of one phase (the reference's command line and YAML files)."""

    batch_size: int = Field(ge=1, description="Images per update over all devices, accumulation included.")
    accumulate: int = Field(default=1, ge=1, description="Batches that one update gathers on each device.")
    epochs: int = Field(ge=1, description="Passes over the rows.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="Optimiser.")
    lr: float = Field(default=5e-4, gt=0, description="Learning rate, before scaling by the batch.")
    lr_batch: int | None = Field(
        default=512, ge=1, description="The rate is multiplied by batch_size / lr_batch; null leaves it as it is."
    )
    min_lr: float = Field(default=1e-5, ge=0, description="End of the cosine.")
    scale_min_lr: bool = Field(default=False, description="Scale min_lr by the batch too (the circuit's trainer).")
    warmup_lr: float = Field(default=1e-6, ge=0, description="Start of the warm-up, never scaled.")
    warmup_epochs: int = Field(default=0, ge=0, description="Epochs of linear warm-up; they do not shift the cosine.")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="Rate by epoch.")
    scheduler_lag: bool = Field(
        default=False,
        description="Parity: the ViT trainer steps its scheduler one epoch late, so that epochs 0 and 1 both run "
        "at the start of the warm-up.",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's decay rates of the moments.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD's momentum.")
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled weight decay.")
    decay: Literal["matrices", "all"] = Field(
        default="matrices",
        description="matrices spares 1-d tensors, biases, class token and positions; all decays every parameter.",
    )
    layer_decay: float = Field(default=1.0, gt=0, le=1, description="Factor of the rate per block towards the input.")
    clip: float | None = Field(default=None, gt=0, description="Largest gradient norm.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth of the trained network.")
    amp: bool = Field(default=True, description="Mixed precision.")
    only: str | None = Field(default=None, description="Train only parameters whose name contains this.")

    @model_validator(mode="after")
    def _fits(self) -> Phase:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}.")
        if self.layer_decay < 1 and self.decay == "all":
            raise ValueError("layer_decay works with decay: matrices only.")
        return self

    @property
    def scaled_lr(self) -> float:
        """The rate after scaling."""
        return self.lr * self._factor

    @property
    def scaled_min_lr(self) -> float:
        """The end of the cosine after scaling."""
        return self.min_lr * (self._factor if self.scale_min_lr else 1.0)

    @property
    def _factor(self) -> float:
        return self.batch_size / self.lr_batch if self.lr_batch else 1.0

    def scheduler(self, optimizer: Optimizer) -> CosineLRScheduler:
        """A timm cosine with this phase's warm-up; step it with the epoch number. Importing timm imports torch."""
        return cosine_scheduler(optimizer, self.epochs, self.warmup_epochs, self.warmup_lr, self.scaled_min_lr)

    def rates(self) -> list[float]:
        """The learning rate of every epoch."""
        if self.schedule == "constant":
            return [self.scaled_lr] * self.epochs
        values = rates_after_step(self.scaled_lr, self.epochs, self.warmup_epochs, self.warmup_lr, self.scaled_min_lr)
        return values[: self.epochs] if self.scheduler_lag else values[1:]


class Augmentation(Settings):
    """Training transforms and label mixing of the DeiT recipe."""

    image_size: int = Field(
        default=224,
        ge=1,
        description="Side in pixels where a circuit is trained and tested; others have their own.",
    )
    normalisation: Literal["data", "imagenet"] = Field(
        default="data", description="Of pixels: as the data set has it, or ImageNet's, for pretrained weights."
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", description="Of random crops; images without augmentation are resized as their set asks."
    )
    randaugment: str | None = Field(default="rand-m9-mstd0.5-inc1", description="timm's auto-augment policy.")
    color_jitter: float = Field(default=0.4, ge=0, description="Strength of colour jitter (without RandAugment).")
    erasing: float = Field(default=0.25, ge=0, le=1, description="Probability of random erasing, by pixels, once.")
    mixup: float = Field(default=0.8, ge=0, description="Alpha of mixup.")
    cutmix: float = Field(default=1.0, ge=0, description="Alpha of CutMix.")
    mix_prob: float = Field(default=1.0, ge=0, le=1, description="Probability that a batch is mixed.")
    switch_prob: float = Field(default=0.5, ge=0, le=1, description="Probability of CutMix where both are on.")
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Label smoothing.")
    repeats: int = Field(default=3, ge=1, description="Repeated augmentation: copies of an image per epoch.")

    @model_validator(mode="after")
    def _crops(self) -> Augmentation:
        if self.interpolation != "bicubic" and self.plain:
            raise ValueError(
                f"interpolation={self.interpolation} is of random crops, and randaugment, erasing and color_jitter are "
                "off: leave it out."
            )
        return self

    @property
    def plain(self) -> bool:
        """Whether training images are those of evaluation: nothing is drawn, so what a network says can be kept."""
        return self.randaugment is None and self.erasing == 0 and self.color_jitter == 0


def cosine_scheduler(
    optimizer: Optimizer, epochs: int, warmup_epochs: int, warmup_lr: float, min_lr: float
) -> CosineLRScheduler:
    """A timm scheduler in the reference's settings: warm-up is not a prefix, so the cosine is not shifted."""
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=min_lr, warmup_t=warmup_epochs, warmup_lr_init=warmup_lr
    )


def rates_after_step(base_lr: float, epochs: int, warmup_epochs: int, warmup_lr: float, min_lr: float) -> list[float]:
    """The rate at construction, then after ``step(e)`` for e from 0 to ``epochs - 1``.

    ``warmup_lr + e * (base - warmup_lr) / warmup`` while e < warmup, then
    ``min + (base - min) * (1 + cos(pi * e / epochs)) / 2``.
    """
    import torch

    optimizer: Any = torch.optim.SGD([torch.zeros(1)], lr=base_lr)
    scheduler = cosine_scheduler(optimizer, epochs, warmup_epochs, warmup_lr, min_lr)
    values = [float(optimizer.param_groups[0]["lr"])]
    for epoch in range(epochs):
        scheduler.step(epoch)
        values.append(float(optimizer.param_groups[0]["lr"]))
    return values
