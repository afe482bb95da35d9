"""Vision transformers cut into stages, in words: torch-free, frozen records for configurations.

A :class:`ViTSpec` is a plain ViT, or the first, a middle or the last part of one; a :class:`VMoESpec` adds expert
layers and stitches. ``moe.models.vit_stages`` and ``moe.models.vmoe`` turn them into modules.

Sources: ViT (arXiv 2010.11929), DeiT (2012.12877), V-MoE (2106.05974), m2mKD (2402.16918, section 4 and public code).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import SpecError, nearest
from moe.router_spec import RouterSpec

Part = Literal["whole", "first", "middle", "last"]


class ViTSpec(BaseModel):
    """A pre-norm ViT with class token and learned positions, whose blocks are counted by stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=1, le=4096, description="Side of the input in pixels.")
    patch_size: int = Field(default=16, ge=1, le=256, description="Side of a patch; must divide image_size.")
    channels: int = Field(default=3, ge=1, le=64, description="Channels of the input image.")
    dim: int = Field(ge=1, le=16384, description="Width D of the tokens.")
    heads: int = Field(ge=1, le=256, description="Attention heads; must divide the width.")
    mlp_ratio: float = Field(default=4.0, gt=0, le=32, description="Hidden width of an MLP as a multiple of D.")
    qkv_bias: bool = Field(default=True, description="Biases of query, key and value.")
    ln_eps: float = Field(default=1e-6, gt=0, le=1e-2, description="Epsilon of every LayerNorm of the backbone.")
    num_classes: int = Field(default=1000, ge=1, description="Outputs K of the head.")
    depths: tuple[int, ...] = Field(min_length=1, description="Blocks of each stage; their sum is the depth.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth of the last block; rises from 0.")
    part: Part = Field(
        default="whole",
        description="whole: embeds images and has norm and head. first, middle, last: one stage of a longer network; "
        "only first embeds, only last has norm and head.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}.")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}.")
        if min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} has an empty stage; every stage needs at least one block.")
        return self

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.depths)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Block range ``[start, end)`` of every stage."""
        return spans_of(self.depths)

    @property
    def embeds(self) -> bool:
        """Whether it takes images (otherwise tokens)."""
        return self.part in ("whole", "first")

    @property
    def classifies(self) -> bool:
        """Whether it ends in logits (otherwise tokens)."""
        return self.part in ("whole", "last")

    def stage(self, index: int) -> Self:
        """The spec of one stage as a network of its own.

        Args:
            index: 0-based position; -1 is the last.

        Raises:
            SpecError: there is no such stage, or this is itself a part.
        """
        if self.part != "whole":
            raise SpecError(f"Only a whole network has stages, this is a {self.part} part.", "Split the whole spec.")
        place = position_of(index, len(self.depths))
        return self.model_copy(update={"depths": (self.depths[place],), "part": part_of(place, len(self.depths))})


class VMoESpec(ViTSpec):
    """A ViT in which some MLPs are mixtures of experts, and whose blocks may have stitches at entrance and exit."""

    moe_blocks: tuple[int, ...] = Field(default=(), description="Blocks with experts, counted over this network.")
    num_experts: int = Field(default=8, ge=1, le=1024, description="Experts E of each of them.")
    router: RouterSpec = Field(
        default=RouterSpec(gate="naive", top_k=2),
        description="The recipe's: naive gate, top-2, nothing dropped, no auxiliary loss.",
    )
    balance_weight: float = Field(default=0.0, ge=0, le=10, description="Weight of the auxiliary loss.")
    pre_stitch: tuple[int, ...] = Field(default=(), description="Blocks that start with a stitch: stitch_dim to D.")
    post_stitch: tuple[int, ...] = Field(default=(), description="Blocks that end with a stitch: D to stitch_dim.")
    stitch_dim: int | None = Field(default=None, ge=1, le=16384, description="Width on the other side of a stitch.")
    expert_init: Literal["official", "linear"] = Field(
        default="official",
        description="official: uniform with bound 1/sqrt(fan_in * fan_out), nearly a zero map (a property of the "
        "reference's 3-d weights). linear: bound 1/sqrt(fan_in), as nn.Linear.",
    )

    @model_validator(mode="after")
    def _positions(self) -> Self:
        for name in ("moe_blocks", "pre_stitch", "post_stitch"):
            chosen: tuple[int, ...] = getattr(self, name)
            outside = [i for i in chosen if not 0 <= i < self.depth]
            if outside or len(set(chosen)) != len(chosen):
                raise ValueError(f"{name}={chosen} must be different block numbers from 0 to {self.depth - 1}.")
        if self.moe_blocks and self.router.top_k > self.num_experts:
            raise ValueError(f"top_k={self.router.top_k} is more than num_experts={self.num_experts}.")
        if (self.pre_stitch or self.post_stitch) and self.stitch_dim is None:
            raise ValueError("pre_stitch and post_stitch need stitch_dim, the width of the neighbouring network.")
        if self.balance_weight > 0 and self.router.balance == "none":
            raise ValueError(f"balance_weight={self.balance_weight} has no effect: router.balance is none.")
        self._check_widths()
        return self

    def _check_widths(self) -> None:
        """Stitches of neighbouring blocks must meet at one width."""
        width = self.in_dim
        for block in range(self.depth):
            wanted = (self.stitch_dim or 0) if block in self.pre_stitch else self.dim
            if width != wanted:
                raise ValueError(
                    f"Block {block} takes tokens of width {wanted} and gets {width}: "
                    f"pre_stitch={self.pre_stitch}, post_stitch={self.post_stitch}, stitch_dim={self.stitch_dim}."
                )
            width = (self.stitch_dim or 0) if block in self.post_stitch else self.dim
        if self.classifies and width != self.dim:
            raise ValueError(f"Block {self.depth - 1} ends in a stitch of width {width}, the head takes {self.dim}.")

    @property
    def in_dim(self) -> int:
        """Width of the tokens that enter the first block."""
        if not self.embeds and 0 in self.pre_stitch:
            return self.stitch_dim or self.dim
        return self.dim


def stitched(model: VMoESpec, stitch_dim: int) -> VMoESpec:
    """The model with its students' stitches kept: an exit before and an entrance after every border of two stages."""
    borders = [start for start, _ in model.spans[1:]]
    fields = {
        "pre_stitch": tuple(borders),
        "post_stitch": tuple(border - 1 for border in borders),
        "stitch_dim": stitch_dim,
    }
    return VMoESpec(**{**model.model_dump(), **fields})


def spans_of(depths: Sequence[int]) -> list[tuple[int, int]]:
    """Block range ``[start, end)`` of every stage."""
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [(end - depth, end) for end, depth in zip(ends, depths, strict=True)]


def position_of(index: int, count: int) -> int:
    """A position from 0, given one that may be -1 for the last.

    Raises:
        SpecError: outside of ``count`` positions.
    """
    if not -1 <= index < count:
        raise SpecError(f"There is no position {index} among {count}.", f"Use 0 to {count - 1}, or -1 for the last.")
    return index % count


def part_of(position: int, count: int) -> Part:
    """What a stage is: the only one, the first, the last, or one between."""
    if count == 1:
        return "whole"
    return "first" if position == 0 else "last" if position == count - 1 else "middle"


_SIZES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {"dim": 768, "heads": 12, "depths": (12,)},
    "vit_base_patch16_384": {"dim": 768, "heads": 12, "depths": (12,), "image_size": 384},
    "vit_large_patch16_224": {"dim": 1024, "heads": 16, "depths": (24,)},
    "vit_large_patch16_384": {"dim": 1024, "heads": 16, "depths": (24,), "image_size": 384},
    # Parity: the released huge modules have no qkv bias and an epsilon of 1e-5; with others they do not load or agree.
    "vit_huge_patch14_224": {
        "dim": 1280,
        "heads": 16,
        "depths": (32,),
        "patch_size": 14,
        "qkv_bias": False,
        "ln_eps": 1e-5,
    },
    "vit_huge_patch14_392": {
        "dim": 1280,
        "heads": 16,
        "depths": (32,),
        "patch_size": 14,
        "image_size": 392,
        "qkv_bias": False,
        "ln_eps": 1e-5,
    },
    "deit_tiny_patch16_224": {"dim": 192, "heads": 3, "depths": (12,)},
    "deit_small_patch16_224": {"dim": 384, "heads": 6, "depths": (12,)},
    "deit_base_patch16_224": {"dim": 768, "heads": 12, "depths": (12,)},
}
_VMOE_SIZES: dict[str, dict[str, Any]] = {
    "vmoe_base": {"dim": 768, "heads": 12, "depths": (3, 3, 3, 3)},
    "vmoe_large": {"dim": 1024, "heads": 16, "depths": (6, 6, 6, 6)},
    "vmoe_huge": {"dim": 1280, "heads": 16, "depths": (8, 8, 8, 8), "patch_size": 14},
}


def named_vit(name: str, **changes: Any) -> ViTSpec:
    """A ViT of the reference by name, e.g. ``named_vit("vit_large_patch16_224", depths=(6, 6, 6, 6))``.

    Raises:
        SpecError: unknown name; the message suggests the nearest.
    """
    if name not in _SIZES:
        raise SpecError(f"There is no ViT named {name!r}.", nearest(name, _SIZES))
    return ViTSpec(**{**_SIZES[name], **changes})


def named_vmoe(name: str, **changes: Any) -> VMoESpec:
    """A V-MoE of the reference by name; every block has 8 experts, top-2, unless ``changes`` says otherwise.

    Raises:
        SpecError: unknown name; the message suggests the nearest.
    """
    if name not in _VMOE_SIZES:
        raise SpecError(f"There is no V-MoE named {name!r}.", nearest(name, _VMOE_SIZES))
    fields = {**_VMOE_SIZES[name], **changes}
    return VMoESpec(**{"moe_blocks": tuple(range(sum(fields["depths"]))), **fields})


def student_specs(model: VMoESpec, stitch_dim: int) -> list[VMoESpec]:
    """One student module per stage of a V-MoE, with stitches to a teacher's width where it has neighbours.

    Args:
        model: the final model; its own stitches are replaced.
        stitch_dim: width of the meta model. Stitches are made even when it equals the student's, as in the reference.

    Returns:
        Specs whose block numbers start at 0.
    """
    found = []
    for index, (start, end) in enumerate(model.spans):
        part = part_of(index, len(model.depths))
        fields = {
            "depths": (end - start,),
            "part": part,
            "moe_blocks": tuple(i - start for i in model.moe_blocks if start <= i < end),
            "pre_stitch": () if part in ("whole", "first") else (0,),
            "post_stitch": () if part in ("whole", "last") else (end - start - 1,),
            "stitch_dim": stitch_dim,
        }
        found.append(VMoESpec(**{**model.model_dump(), **fields}))
    return found
