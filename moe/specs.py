"""What a model is, in words: torch-free, frozen records that YAML, artifacts and workers share.

A :class:`BackboneSpec` names an architecture, a :class:`StudentMoESpec` the mixture-of-experts block that a student may
carry. ``moe.backbones`` turns them into modules.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe.errors import nearest
from moe.jetpack_specs import JetViTSpec
from moe.models.emoe_spec import EMoESpec
from moe.models.gmoe_spec import GMoESpec
from moe.models.vit_specs import VMoESpec

TORCHVISION_CHILDREN = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
"""torchvision networks whose last child ``fc`` is the head."""

TORCHVISION_FEATURES = ("densenet121", "densenet161", "densenet169", "densenet201")
"""torchvision networks with one child ``features`` and one child ``classifier``."""

PLAIN_NAMES = ("tiny_cnn", "mnist_cnn", "vit_small_focus", "mobilenet_v2_sort", "jetvit", "vmoe")
"""Backbones with a name of their own."""


class BackboneSpec(BaseModel):
    """An image network without its head.

    ``tiny_cnn`` is a 4-layer network for quick experiments, ``mnist_cnn`` DomainBed's for 28 x 28 inputs;
    ``torchvision:resnet50``, ``torchvision:densenet121`` and relatives are the papers'; ``timm:<name>`` is any timm
    model that ends in a linear layer; ``vit_small_focus`` is a ViT-S/14 of DINOv2 form and ``mobilenet_v2_sort`` a
    MobileNetV2, both with real weights inside Python packages. ``jetvit`` and ``vmoe`` are the networks that MoE
    Jetpack and m2mKD make, described by the field of that name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="tiny_cnn, mnist_cnn, torchvision:NAME, timm:NAME, vit_small_focus, mobilenet_v2_sort, jetvit or "
        "vmoe."
    )
    pretrained: bool | str = Field(
        default=False,
        description="False for random weights, True for the package's own weights (they must be available offline), "
        "or the path of a .safetensors or .pth file.",
    )
    channels: int = Field(default=3, ge=1, le=4096, description="Channels of the input image, or of the token map.")
    image_size: int | None = Field(
        default=None, ge=1, le=4096, description="Side of the input in pixels; vision transformers are built for it."
    )
    width: int | None = Field(
        default=None, ge=1, le=1024, description="Channels of tiny_cnn's first layer (16 when left out); others: none."
    )
    last_relu: bool = Field(
        default=False,
        description="DenseNet only: apply the last ReLU in feature extractors and students as well; the public "
        "checkpoints leave it out there.",
    )
    first_block: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Vision transformers only: begin at this block; the input is the token map that the frozen blocks "
        "before it made (data set frozen_vit).",
    )
    gmoe: GMoESpec | None = Field(
        default=None,
        description="Vision transformers of timm and jetvit: feed-forward networks become mixtures of experts.",
    )
    emoe: EMoESpec | None = Field(
        default=None, description="Vision transformers of timm and jetvit: neurons of emoe_layers grouped into experts."
    )
    emoe_layers: tuple[int, ...] = Field(default=(), description="Blocks that emoe converts, from 0.")
    jetvit: JetViTSpec | None = Field(
        default=None, description="jetvit: the network; channels and image_size above replace those in it."
    )
    vmoe: VMoESpec | None = Field(
        default=None, description="vmoe: the network; channels and image_size above replace those in it."
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        source, _, rest = name.partition(":")
        if name in PLAIN_NAMES or (source == "timm" and rest):
            return name
        allowed = [f"torchvision:{n}" for n in (*TORCHVISION_CHILDREN, *TORCHVISION_FEATURES)]
        if name in allowed:
            return name
        raise ValueError(
            f"There is no backbone named {name!r}. " + nearest(name, [*PLAIN_NAMES, *allowed, "timm:NAME"])
        )

    @model_validator(mode="after")
    def _fits(self) -> BackboneSpec:
        if self.width is not None and self.name != "tiny_cnn":
            raise ValueError(f"width={self.width} has no meaning for {self.name!r}; it scales tiny_cnn only.")
        if self.last_relu and not self.name.startswith("torchvision:densenet"):
            raise ValueError(f"last_relu has no meaning for {self.name!r}; it is a choice of the DenseNet family.")
        transformer = self.name in ("vit_small_focus", "jetvit") or self.name.startswith("timm:")
        changed = [field for field in ("first_block", "gmoe", "emoe") if getattr(self, field) is not None]
        if changed and (not transformer or (changed[0], self.name) == ("first_block", "jetvit")):
            raise ValueError(f"{changed[0]} has no meaning for {self.name!r}; it is for vision transformers of timm.")
        if len(changed) > 1:
            raise ValueError(f"{' and '.join(changed)} cannot be combined; leave all but one of them out.")
        if (self.emoe is None) != (not self.emoe_layers):
            raise ValueError("emoe and emoe_layers belong together: experts, and the blocks that get them.")
        for name in ("jetvit", "vmoe"):
            if (getattr(self, name) is None) != (self.name != name):
                raise ValueError(f"The backbone {name!r} and the field `{name}`, which describes it, belong together.")
        if self.jetvit is not None and self.gmoe is not None:
            asked, default = self.gmoe.drop_path, GMoESpec.model_fields["drop_path"].default
            if asked not in (default, self.jetvit.drop_path):
                raise ValueError(f"gmoe.drop_path={asked} has no meaning for jetvit: set jetvit.drop_path.")
        if self.name == "vit_small_focus" and self.image_size is not None and self.image_size % 14:
            near = max(14, round(self.image_size / 14) * 14)
            raise ValueError(f"image_size={self.image_size} is not a multiple of the patch of 14 pixels; use {near}.")
        return self


class StudentMoESpec(BaseModel):
    """A mixture-of-experts block on the pooled features of a student: ``z + MoE(LayerNorm(z))``.

    Its output projections start at zero, so that an MoE student begins exactly as its dense parent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: int = Field(ge=1, le=1024, description="Experts E of the block.")
    top_k: int = Field(default=1, ge=1, le=64, description="Experts K that each image uses.")
    hidden_ratio: float = Field(default=2.0, gt=0, le=16, description="Hidden width of an expert as a multiple of D.")
    capacity_factor: float = Field(
        default=1.25, gt=0, le=64, description="Slots per expert while training, times images x top_k / experts."
    )
    balance_weight: float = Field(default=0.01, ge=0, le=10, description="Weight of the load-balance loss.")
    dropless: bool = Field(
        default=True,
        description="No image is dropped. False applies capacity_factor while training; never at inference.",
    )

    @model_validator(mode="after")
    def _fits(self) -> StudentMoESpec:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}.")
        return self


class MetaStepSpec(BaseModel):
    """How one meta-distillation step is computed (``moe.meta_step``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inner_lr: float = Field(gt=0, le=10, description="Rate alpha of the inner gradient step on the student's features.")
    inner_steps: int = Field(default=1, ge=1, le=20, description="Inner steps, all on the same support batch.")
    order: Literal["second", "first", "exact_aggregator"] = Field(
        default="second",
        description="second: full gradients through the inner step. first: inner gradient taken as constant, so the "
        "aggregator learns nothing. exact_aggregator: first order for the student, exact for the aggregator.",
    )
    exclusion: Literal["drop", "zero", "none"] = Field(
        default="drop", description="What happens to the token of the expert that owns the domain."
    )
    adapt: Literal["all", "norm"] = Field(
        default="all",
        description="Feature parameters that the inner step moves: all, or those of normalisation layers.",
    )
    learn_rates: bool = Field(default=False, description="Learn one inner rate per tensor, starting from inner_lr.")
    loss_before: bool = Field(
        default=False, description="Also compute the query loss before the inner step, for the record only."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16 runs forward passes under autocast; parameters and inner updates stay float32.",
    )
