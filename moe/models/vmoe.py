"""V-MoE: a vision transformer whose chosen blocks have experts in place of the MLP, with optional stitches.

    x -> [pre_stitch] -> x + attn(LN x) -> x + experts(LN x) -> [post_stitch]

Blocks are timm's, their ``mlp`` is a :class:`moe.layers.layer.MoELayer` (names ``blocks.<i>.mlp.{gate,experts}.*``;
``moe.keymaps.m2mkd`` translates the reference's). A stitch is LayerNorm and Linear between the width of this network
and that of a teacher: ``blocks.<i>.{pre,post}_stitch.{ln,fc}``. Student modules and the final model are the same class.

Sources: V-MoE (arXiv 2106.05974), m2mKD (2402.16918, public code on fastmoe).

- Parity: every token, the class token included, is routed; top-2, softmax over the two logits, no capacity, no
  auxiliary loss; experts start almost as zero maps (``expert_init="official"``).
- Differs: GShard, Switch and noisy gates, capacity, batch priority and weighted auxiliary losses are options here.

Shapes: B batch, T tokens, D width, E experts, H hidden width of an expert, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moe.errors import CheckpointError
from moe.layers.layer import MoELayer
from moe.models.vit_specs import ViTSpec, VMoESpec
from moe.models.vit_stages import WEIGHT_STD, ViTStages, block_arguments

STITCH_EPS = 1e-5


class Stitch(nn.Module):
    """LayerNorm and Linear from one width to another; names ``ln`` and ``fc``."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(in_dim, eps=STITCH_EPS)
        self.fc = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_dim]`` to ``[..., out_dim]``."""
        out: Tensor = self.fc(self.ln(x))
        return out


class StitchedBlock(Block):  # type: ignore[misc]
    """timm's block with a stitch before and after it, where given."""

    pre_stitch: nn.Module
    post_stitch: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, T, entering width]`` to ``[B, T, leaving width]``."""
        out: Tensor = self.post_stitch(super().forward(self.pre_stitch(x)))
        return out


class VMoE(ViTStages):
    """A V-MoE, or one student module of it; see :class:`moe.models.vit_stages.ViTStages` for ``forward``."""

    spec: VMoESpec

    def _block(self, index: int, drop_path: float) -> nn.Module:
        spec = self.spec
        block = StitchedBlock(**block_arguments(spec, drop_path))
        if index in spec.moe_blocks:
            block.mlp = MoELayer(spec.dim, int(spec.dim * spec.mlp_ratio), spec.router, spec.num_experts)
            init_experts(block.mlp, spec)
        wide = spec.stitch_dim or spec.dim
        block.pre_stitch = Stitch(wide, spec.dim) if index in spec.pre_stitch else nn.Identity()
        block.post_stitch = Stitch(spec.dim, wide) if index in spec.post_stitch else nn.Identity()
        return block

    @property
    def in_dim(self) -> int:
        """Width of the tokens that enter the first block (the stitch's, where there is one)."""
        return self.spec.in_dim

    def moe_layers(self) -> dict[int, MoELayer]:
        """The expert layers by block."""
        return {index: cast("MoELayer", self.blocks[index].mlp) for index in sorted(self.spec.moe_blocks)}


def build_vit(spec: ViTSpec) -> ViTStages:
    """The network of a spec, randomly initialised: a :class:`VMoE` for a :class:`VMoESpec`, else a plain ViT."""
    return VMoE(spec) if isinstance(spec, VMoESpec) else ViTStages(spec)


def init_experts(layer: MoELayer, spec: VMoESpec) -> None:
    """Draw an expert layer's weights: gate normal of 0.02, biases 0, experts uniform (see ``VMoESpec.expert_init``)."""
    for name, parameter in layer.named_parameters():
        if name in ("experts.w1", "experts.w2"):
            fan_out, fan_in = parameter.shape[1:]
            # Parity: fastmoe initialises a [1, out, in] tensor, whose fan-in PyTorch takes to be out * in.
            fan = fan_in * fan_out if spec.expert_init == "official" else fan_in
            nn.init.uniform_(parameter, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        elif name == "gate.weight":
            nn.init.trunc_normal_(parameter, std=WEIGHT_STD)
        elif name in ("gate.bias", "experts.b1", "experts.b2"):
            nn.init.zeros_(parameter)


def upcycle_mlps(
    state: Mapping[str, Tensor], spec: VMoESpec, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Weights of a V-MoE from those of a dense ViT of the same shape: every expert starts as a copy of the block's MLP.

    An extra: the reference has no such path (its experts come from student modules). Gates are drawn (normal of 0.02).

    Args:
        state: dense weights, ``blocks.<i>.mlp.fc1.weight`` and so on.
        spec: the V-MoE, without stitches.
        generator: for the gates.

    Raises:
        CheckpointError: a block with experts has no dense MLP in ``state``, or one of another width.
    """
    result = {name: value for name, value in state.items() if not _in_experts(name, spec)}
    hidden = int(spec.dim * spec.mlp_ratio)
    wanted = {
        "fc1.weight": (hidden, spec.dim),
        "fc1.bias": (hidden,),
        "fc2.weight": (spec.dim, hidden),
        "fc2.bias": (spec.dim,),
    }
    names = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
    for index in spec.moe_blocks:
        prefix = f"blocks.{index}.mlp."
        for name, shape in wanted.items():
            value = state.get(prefix + name)
            if value is None or tuple(value.shape) != shape:
                seen = "missing" if value is None else tuple(value.shape)
                raise CheckpointError(
                    f"Dense weight {prefix + name} is {seen}; experts of this V-MoE are copies of {shape}.",
                    "Use a ViT of the same width, depth and mlp_ratio.",
                )
            result[f"{prefix}experts.{names[name]}"] = value.unsqueeze(0).repeat(spec.num_experts, *[1] * value.ndim)
        gate = torch.empty(spec.num_experts, spec.dim).normal_(std=WEIGHT_STD, generator=generator)
        result |= {f"{prefix}gate.weight": gate, f"{prefix}gate.bias": torch.zeros(spec.num_experts)}
    return result


def _in_experts(name: str, spec: VMoESpec) -> bool:
    return any(name.startswith(f"blocks.{index}.mlp.") for index in spec.moe_blocks)
