"""The networks of MoE Jetpack in words, both families: torch-free records of vision transformers and ConvNeXts.

Source: MoE Jetpack (arXiv 2406.04801): V-JetMoE and C-JetMoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from moe.errors import SpecError
from moe.jetpack_specs import JetViTSpec, SoftMoESpec, SpheroSpec, released_slots


class JetConvNeXtSpec(BaseModel):
    """A ConvNeXt of timm whose chosen blocks carry slots instead of their pointwise maps (C-JetMoE).

    Maps shrink from stage to stage, so each stage has its own number of experts. The defaults are the geometry of
    C-JetMoE-F, which is inferred: the public code holds no ConvNeXt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=32, le=4096, description="Side of the input in pixels; a multiple of 32.")
    channels: int = Field(default=3, ge=1, le=64, description="Channels of the input.")
    dims: tuple[int, ...] = Field(default=(48, 96, 192, 384), min_length=1, max_length=8, description="Stage widths.")
    depths: tuple[int, ...] = Field(default=(3, 3, 9, 3), min_length=1, max_length=8, description="Blocks by stage.")
    init_values: float | None = Field(default=1e-6, description="Layer scale: start value, or None for none.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth of the last block, linear from 0.")
    moe: SpheroSpec | SoftMoESpec | None = Field(
        default=None, description="The slots; its drop_path is the last block's, linear over depth. None: dense."
    )
    moe_layers: tuple[int, ...] = Field(default=(), description="Blocks that carry a layer, from 0 over all stages.")
    stage_experts: tuple[tuple[int, int] | None, ...] = Field(
        default=(),
        description="Core and universal experts of each stage's blocks (Soft MoE: their sum), with noise_mult "
        "1/(core + universal). null, or a stage beyond the list: the experts of `moe`.",
    )

    @model_validator(mode="after")
    def _fits(self) -> JetConvNeXtSpec:
        if len(self.dims) != len(self.depths):
            raise ValueError(f"dims has {len(self.dims)} stages, depths {len(self.depths)}.")
        if min(*self.dims, *self.depths, 1) < 1:
            raise ValueError("dims and depths must be positive.")
        if self.image_size % (2 ** (len(self.dims) + 1)):
            raise ValueError(f"image_size={self.image_size} is not a multiple of {2 ** (len(self.dims) + 1)}.")
        wrong = sorted({i for i in self.moe_layers if not 0 <= i < sum(self.depths)})
        if wrong:
            raise ValueError(f"blocks {wrong} do not exist; there are {sum(self.depths)}, from 0.")
        if self.moe_layers and self.moe is None:
            raise ValueError(f"blocks {sorted(self.moe_layers)} are to carry slots, but moe is not given.")
        given = {stage for stage, counts in enumerate(self.stage_experts) if counts is not None}
        lost = sorted(given - {self.stage_of(i) for i in self.moe_layers})
        if lost:
            raise ValueError(f"stage_experts gives experts to the stages {lost}, which have no block of moe_layers.")
        if any(
            min(self.stage_experts[stage] or (0,)) < 0 or not sum(self.stage_experts[stage] or ()) for stage in given
        ):
            raise ValueError(f"stage_experts {list(self.stage_experts)} leaves a stage without experts.")
        return self

    def experts_of(self, stage: int) -> tuple[int, int] | None:
        """Core and universal experts that ``stage_experts`` gives a stage."""
        return self.stage_experts[stage] if stage < len(self.stage_experts) else None

    @property
    def dim(self) -> int:
        """Width of the last stage, which the head reads."""
        return self.dims[-1]

    def stage_of(self, block: int) -> int:
        """Stage of a block, both from 0."""
        return next(s for s in range(len(self.depths)) if block < sum(self.depths[: s + 1]))

    def tokens(self, stage: int) -> int:
        """Positions of a stage's maps."""
        side: int = self.image_size // 2 ** (stage + 2)
        return side * side

    def layer_spec(self, block: int) -> SpheroSpec | SoftMoESpec:
        """What a block of ``moe_layers`` carries."""
        moe = self.moe
        if moe is None:
            raise SpecError(f"Block {block} of this network carries no slots.")
        rate = moe.drop_path * block / max(1, sum(self.depths) - 1)
        fields: dict[str, Any] = {"drop_path": rate}
        if (counts := self.experts_of(self.stage_of(block))) is not None:
            sphero = isinstance(moe, SpheroSpec)
            own = dict(zip(("core_experts", "univ_experts"), counts, strict=True))
            fields |= {**own, "noise_mult": 1 / sum(counts)} if sphero else {"num_experts": sum(counts)}
        return moe.model_copy(update=fields)


def _family(value: Any) -> str:
    """Which of the two networks a record, or plain values, describe."""
    if isinstance(value, Mapping):
        return "convnext" if {"dims", "depths", "stage_experts"} & value.keys() else "vit"
    return "convnext" if isinstance(value, JetConvNeXtSpec) else "vit"


JetSpec = Annotated[
    Annotated[JetViTSpec, Tag("vit")] | Annotated[JetConvNeXtSpec, Tag("convnext")], Discriminator(_family)
]
"""A network of MoE Jetpack: a ConvNeXt when ``dims`` or ``depths`` are given, else a vision transformer."""


def jet_spec(values: Mapping[str, Any]) -> JetViTSpec | JetConvNeXtSpec:
    """The record of a network from plain values."""
    return JetConvNeXtSpec(**values) if _family(values) == "convnext" else JetViTSpec(**values)


def c_jetmoe(image_size: int = 224, **changes: object) -> JetConvNeXtSpec:
    """The paper's C-JetMoE-F: blocks 10-18 of 18 carry slots, 98 + 196 experts in stage 3 and 24 + 48 in stage 4.

    Args:
        image_size: side in pixels; half as many core experts as positions, and twice as many universal ones.
        changes: fields that are replaced.
    """
    fields: dict[str, object] = {"image_size": image_size, "drop_path": 0.1, "moe": released_slots()}
    geometry = JetConvNeXtSpec(image_size=image_size)
    cores = [max(1, geometry.tokens(stage) // 2) for stage in (2, 3)]
    fields |= {"stage_experts": (None, None, *((core, 2 * core) for core in cores))}
    return JetConvNeXtSpec.model_validate({**fields, "moe_layers": tuple(range(9, 18)), **changes})
