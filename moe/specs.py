"""What a model is, in words: torch-free, frozen records that YAML, artifacts and workers share.

A :class:`BackboneSpec` names an architecture, a :class:`StudentMoESpec` the mixture-of-experts block that a student may
carry, a :class:`RouterSpec` how tokens find their experts. ``moe.backbones`` and ``moe.layers`` turn them into modules.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe.errors import nearest
from moe.models.gmoe_spec import GMoESpec

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

PLAIN_NAMES = ("tiny_cnn", "mnist_cnn", "vit_small_focus", "mobilenet_v2_sort")
"""Backbones with a name of their own."""


class BackboneSpec(BaseModel):
    """An image network without its head.

    ``tiny_cnn`` is a 4-layer network for quick experiments, ``mnist_cnn`` DomainBed's for 28 x 28 inputs;
    ``torchvision:resnet50``, ``torchvision:densenet121`` and relatives are the papers'; ``timm:<name>`` is any timm
    model that ends in a linear layer; ``vit_small_focus`` is a ViT-S/14 of DINOv2 form and ``mobilenet_v2_sort`` a
    MobileNetV2, both with real weights inside Python packages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="tiny_cnn, mnist_cnn, torchvision:NAME, timm:NAME, vit_small_focus or mobilenet_v2_sort."
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
        default=None, description="Vision transformers of timm only: make feed-forward networks mixtures of experts."
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
        if self.first_block is not None and not self.name.startswith("timm:") and self.name != "vit_small_focus":
            raise ValueError(f"first_block has no meaning for {self.name!r}; it is for vision transformers.")
        if self.first_block is not None and self.gmoe is not None:
            raise ValueError("first_block and gmoe cannot be combined; leave one of them out.")
        if self.gmoe is not None and not self.name.startswith("timm:") and self.name != "vit_small_focus":
            raise ValueError(f"gmoe has no meaning for {self.name!r}; it is for vision transformers of timm.")
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


class RouterSpec(BaseModel):
    """How tokens find their experts (``moe.layers.router``): gate, choice, weights, capacity, balance loss.

    The gates come in two families. ``linear``, ``cosine`` and ``avg_k`` (Tutel: GMoE, EMoE) take the K best softmax
    probabilities, weigh by them and give seats rank by rank. ``naive``, ``noisy``, ``gshard`` and ``switch`` (fastmoe:
    m2mKD) weigh by a softmax over the chosen logits (switch: by the probability) and give seats token by token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gate: Literal["linear", "cosine", "avg_k", "naive", "noisy", "gshard", "switch"] = Field(
        default="linear", description="avg_k: the mean keys of the experts, never trained. See the class for the rest."
    )
    top_k: int = Field(default=1, ge=1, le=1024, description="Experts K per token.")
    capacity_factor: float | None = Field(
        default=None,
        ge=-1024,
        le=1024,
        description="Seats per expert while training, times an equal share. None drops nothing. Tutel's gates: 0 makes "
        "room for the fullest expert, a negative number does so up to its absolute value.",
    )
    eval_capacity: bool = Field(
        default=False,
        description="Apply capacity in evaluation too, as the official code does; then a token's result depends on the "
        "others in its batch.",
    )
    eval_capacity_factor: float | None = Field(
        default=None, ge=-1024, le=1024, description="Factor in evaluation; capacity_factor when left out."
    )
    alignment: int = Field(default=1, ge=1, le=4096, description="Round the seats per expert up to a multiple of this.")
    official_load: bool = Field(
        default=False,
        description="With batch priority and a factor of 0 or below, size the seats by the official count, which "
        "misses most of the load.",
    )
    batch_prioritized: bool = Field(
        default=False, description="Tokens with the highest best score sit first; else token order."
    )
    normalize_gates: bool = Field(
        default=True, description="With K > 1, scale the K probabilities to sum 1 (before any is dropped)."
    )
    one_score: bool = Field(default=False, description="Every chosen expert weighs exactly 1 (EMoE).")
    pre_score: bool = Field(default=False, description="Weigh the expert's input instead of its output.")
    noise: float = Field(
        default=0.0, ge=0, le=1024, description="Standard deviation of the training noise on logits, times E."
    )
    balance: Literal["none", "gshard", "load_importance", "switch", "noisy"] = Field(
        default="none", description="Auxiliary loss, not weighted here."
    )
    normalize_input: bool = Field(default=False, description="Linear gates: scale tokens to unit length first.")
    projection: int = Field(default=256, ge=1, le=65536, description="Cosine gate: width of the codebook.")
    temperature: float = Field(default=0.5, gt=0, le=1024, description="Cosine gate: initial temperature.")
    max_scale: float = Field(default=100.0, gt=0, le=1e6, description="Cosine gate: largest inverse temperature.")
    noise_epsilon: float = Field(default=1e-2, gt=0, le=1024, description="Noisy gate: smallest standard deviation.")
    switch_eps: float = Field(
        default=0.1, ge=0, le=1024, description="Switch gate: half width of the additive training noise around 1."
    )
    random_routing: bool = Field(
        default=False,
        description="GShard gate: the second expert is skipped at random, more often the less it weighs. In evaluation "
        "only together with eval_capacity.",
    )

    @model_validator(mode="after")
    def _fits(self) -> RouterSpec:
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        gate, tutel = self.gate, self.gate in ("linear", "cosine", "avg_k")
        capped = self.capacity_factor is not None
        negative = min(self.capacity_factor or 0.0, self.eval_capacity_factor or 0.0) < 0
        needs = {"switch": "switch", "noisy": "noisy"}.get(self.balance, gate)
        return [
            (gate == "gshard" and self.top_k != 2, f"The gshard gate chooses 2 experts, not top_k={self.top_k}."),
            (gate == "switch" and self.top_k != 1, f"The switch gate chooses 1 expert, not top_k={self.top_k}."),
            (gate == "avg_k" and not self.one_score, "The avg_k gate is not trained: set one_score to true."),
            (gate in ("naive", "noisy") and capped, f"The {gate} gate has no capacity: leave capacity_factor out."),
            (self.one_score and not tutel, f"one_score=true has no meaning for the {gate} gate."),
            (self.one_score and self.pre_score, "pre_score=true has no effect with one_score=true: leave one out."),
            (self.eval_capacity and not capped, "eval_capacity=true needs a capacity_factor."),
            (
                self.eval_capacity_factor is not None and not self.eval_capacity,
                "eval_capacity_factor is used with eval_capacity=true only.",
            ),
            (self.alignment > 1 and not (capped and tutel), f"alignment={self.alignment} needs a capacity_factor."),
            (negative and not tutel, f"The {gate} gate needs a capacity_factor of 0 or more."),
            (self.batch_prioritized and not tutel, f"The {gate} gate seats tokens in order: no batch_prioritized."),
            (self.noise > 0 and not tutel, f"noise={self.noise} has no meaning for the {gate} gate."),
            (self.random_routing and gate != "gshard", f"random_routing has no meaning for the {gate} gate."),
            (self.normalize_input and gate not in ("linear", "avg_k"), f"The {gate} gate has no normalize_input."),
            (
                self.balance == "load_importance" and not (tutel and self.noise > 0),
                "The load_importance loss needs a linear, cosine or avg_k gate with noise above 0 "
                f"(gate={gate}, noise={self.noise}).",
            ),
            (needs != gate, f"The {self.balance} loss belongs to the {needs} gate, not to {gate}."),
        ]


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
