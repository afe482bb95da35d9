"""What a soft mixture of experts is, in words: torch-free, frozen records of Soft MoE and SpheroMoE layers.

``moe.layers.soft_moe`` and ``moe.layers.sphero`` build them; ``moe.models.sphero_vit`` and ``moe.models.convnext`` put
them into networks. Sources: Soft MoE (arXiv 2308.00951), MoE Jetpack (arXiv 2406.04801) and its released code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import SpecError

ExpertInit = Literal["linear", "official"]


class SlotSpec(BaseModel):
    """What Soft MoE and SpheroMoE have in common.

    Every token contributes to every slot and reads from every slot; nothing is dropped and no balance loss is needed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots_per_expert: int = Field(default=1, ge=1, le=1024, description="Slots S that each expert processes.")
    compress_ratio: float = Field(
        default=1.0, gt=0, le=16, description="Hidden width of an expert is int(4 x this x D)."
    )
    key_proj: Literal["none", "affine", "linear"] = Field(
        default="none",
        description="Map of the tokens before routing. affine: elementwise (released). linear: the paper's.",
    )
    query_proj: Literal["none", "affine"] = Field(default="none", description="Elementwise map of the queries.")
    slot_layernorm: bool = Field(default=False, description="LayerNorm on the queries.")
    noise: bool = Field(default=False, description="Add normal noise to the routing scores.")
    noise_mult: float = Field(default=1.0, ge=0, description="Standard deviation of that noise.")
    noise_in_eval: bool = Field(
        default=False,
        description="Differs: the released layers add noise in evaluation too, so that predictions are random. "
        "True for exact parity.",
    )
    drop: float = Field(default=0.0, ge=0, lt=1, description="Dropout after an expert's second map (and its first).")
    drop_act: float | None = Field(default=None, ge=0, lt=1, description="Dropout after the activation; None: as drop.")
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="Chance to drop the experts' result of a whole sample."
    )
    expert_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Chance to drop each expert for each sample (the paper's); released: none."
    )
    expert_dropout_scale: Literal["rescale", "renormalize"] = Field(
        default="rescale", description="Divide the kept combine weights by the keep rate, or by their sum."
    )
    logit_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Chance to mask a (token, slot) pair in both directions, in training."
    )
    expert_init: ExpertInit = Field(
        default="linear",
        description="linear: each expert starts as two nn.Linear. official: within 1/sqrt(in x out), nearly dead.",
    )


class SoftMoESpec(SlotSpec):
    """A Soft MoE layer as MoE Jetpack's baseline has it."""

    num_experts: int = Field(ge=1, le=65536, description="Experts E.")
    layer_scale: bool = Field(default=False, description="Elementwise affine maps around the experts.")
    logit_dropout_in_eval: bool = Field(
        default=False, description="Parity: the released mask is drawn in evaluation too."
    )


class SpheroSpec(SlotSpec):
    """A SpheroMoE layer: hyperspherical routing, two temperatures, core and universal experts.

    Defaults are the released code's; each alternative of the paper is a field.
    """

    core_experts: int = Field(ge=0, le=65536, description="Large experts C.")
    univ_experts: int = Field(default=0, ge=0, le=65536, description="Small experts U; they follow the core ones.")
    univ_factor: float = Field(default=0.25, gt=0, le=16, description="Hidden width of the small ones over the large.")
    input_as_phi: bool = Field(default=False, description="Queries are interpolated from the tokens, not learned.")
    num_heads: int | None = Field(default=None, ge=1, description="Route in this many channel groups; None: one.")
    keys: Literal["sphere", "raw"] = Field(default="sphere", description="raw: only queries are normalised (paper).")
    combine: Literal["entmax15", "softmax"] = Field(default="entmax15", description="softmax: the paper's.")
    noise_position: Literal["after", "before"] = Field(
        default="after", description="Add the noise after the division by the temperature, or before it (paper)."
    )
    temperatures: Literal["two", "one"] = Field(
        default="two", description="one: dispatch and combine share it (paper)."
    )
    temperature: float = Field(default=0.5, gt=0, description="Start value of the temperatures.")
    temperature_form: Literal["free", "exp", "softplus"] = Field(
        default="free", description="free: the parameter itself, which may cross 0. exp, softplus: always positive."
    )
    temperature_floor: float | None = Field(default=None, gt=0, description="Smallest temperature; None: no floor.")
    learn_temperature: bool = Field(default=True, description="False: set by a schedule (``set_temperatures``).")

    @property
    def num_experts(self) -> int:
        """E = C + U."""
        return self.core_experts + self.univ_experts

    @model_validator(mode="after")
    def _fits(self) -> SpheroSpec:
        if self.num_experts == 0:
            raise ValueError("core_experts and univ_experts are both 0; a layer needs at least one expert.")
        return self


class JetViTSpec(BaseModel):
    """A vision transformer of timm whose chosen blocks carry slots instead of a feed-forward network.

    The defaults are ViT-T/16 with average pooling; ``moe`` and ``moe_layers`` make it V-JetMoE-T.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=1, le=4096, description="Side of the input in pixels.")
    patch_size: int = Field(default=16, ge=1, le=1024, description="Side of a patch; divides it.")
    channels: int = Field(default=3, ge=1, le=64, description="Channels of the input.")
    dim: int = Field(default=192, ge=1, le=16384, description="Width D.")
    depth: int = Field(default=12, ge=1, le=256, description="Blocks.")
    num_heads: int = Field(default=3, ge=1, le=256, description="Attention heads; divide D.")
    mlp_ratio: float = Field(default=4.0, gt=0, le=16, description="Hidden width of dense blocks over D.")
    qkv_bias: bool = Field(default=True, description="Queries, keys and values have a bias.")
    qk_norm: bool = Field(default=False, description="LayerNorm on queries and keys of the attention.")
    init_values: float | None = Field(default=None, description="Layer scale: start value, or None for no layer scale.")
    pre_norm: bool = Field(default=False, description="LayerNorm before the first block.")
    class_token: bool = Field(default=True, description="With a class token.")
    reg_tokens: int = Field(default=0, ge=0, le=64, description="Register tokens.")
    no_embed_class: bool = Field(default=False, description="Positions for patches only.")
    global_pool: Literal["avg", "token", "map"] = Field(default="avg", description="How tokens become one vector.")
    fc_norm: bool | None = Field(default=None, description="Norm after pooling, not before; None: with avg only.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth of the last block, linear from 0.")
    moe: SpheroSpec | SoftMoESpec | None = Field(
        default=None, description="The slots; its drop_path is the last block's, linear over depth. None: dense."
    )
    moe_layers: tuple[int, ...] = Field(default=(), description="Blocks that carry a layer of their own, from 0.")
    shared_layers: dict[str, tuple[int, ...]] = Field(
        default_factory=dict, description="Name -> blocks that share one layer."
    )
    shared_queries: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Name -> shared layers that also share their queries."
    )
    shared_options: Literal["all", "official"] = Field(
        default="all",
        description="official: shared layers lose slot_layernorm, drop path and logit dropout, as released.",
    )

    @model_validator(mode="after")
    def _fits(self) -> JetViTSpec:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}.")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide dim={self.dim}.")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' reads the class token; set class_token or another pooling.")
        blocks = [*self.moe_layers, *(i for group in self.shared_layers.values() for i in group)]
        wrong = sorted({i for i in blocks if not 0 <= i < self.depth})
        if wrong:
            raise ValueError(f"blocks {wrong} do not exist; there are {self.depth}, from 0 to {self.depth - 1}.")
        twice = sorted({i for i in blocks if blocks.count(i) > 1})
        if twice:
            raise ValueError(f"blocks {twice} are named more than once in moe_layers and shared_layers.")
        if blocks and self.moe is None:
            raise ValueError(f"blocks {sorted(blocks)} are to carry slots, but moe is not given.")
        unknown = sorted({n for names in self.shared_queries.values() for n in names} - self.shared_layers.keys())
        if unknown:
            raise ValueError(
                f"shared_queries names the layers {unknown}; shared_layers has {sorted(self.shared_layers)}."
            )
        return self

    def layer_drop_path(self, block: int) -> float:
        """Chance of dropping the experts' result in a block: linear over depth."""
        rate = 0.0 if self.moe is None else self.moe.drop_path
        return rate * block / (self.depth - 1) if self.depth > 1 else 0.0


RELEASED_BLOCKS = tuple(range(6, 12))
"""Blocks of V-JetMoE that carry slots, from 0."""


def released_slots(num_patches: int = 196) -> SpheroSpec:
    """The released SpheroMoE for this many patches: half as many core experts, as many universal ones."""
    core, univ = num_patches // 2, num_patches
    return SpheroSpec(
        core_experts=core,
        univ_experts=univ,
        slot_layernorm=True,
        noise=True,
        noise_mult=1 / (core + univ),
        drop=0.4,
        drop_path=0.1,
    )


def v_jetmoe(size: str = "tiny", **changes: object) -> JetViTSpec:
    """The released V-JetMoE-T (``tiny``) or the paper's V-JetMoE-S (``small``); fields may be replaced.

    Raises:
        SpecError: another size.
    """
    sizes = {"tiny": (192, 3), "small": (384, 6)}
    if size not in sizes:
        raise SpecError(f"There is no V-JetMoE of size {size!r}.", f"Sizes: {', '.join(sizes)}.")
    dim, heads = sizes[size]
    fields = {
        "dim": dim,
        "num_heads": heads,
        "drop_path": 0.1,
        "moe": released_slots(),
        "moe_layers": RELEASED_BLOCKS,
        **changes,
    }
    return JetViTSpec.model_validate(fields)
