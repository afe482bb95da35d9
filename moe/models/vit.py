"""Vision transformers with mixtures of experts (GMoE), on timm's modules.

:func:`build_vit` makes one of any geometry, :func:`gmoe_vit` one under a timm name; both give timm's own class, so
``vit(images)`` are logits and state-dict names are the usual ones. :func:`run_vit` is the pass that also returns
features, routing records, auxiliary losses and, on request, attention maps, and that takes injected draws; without maps
attention is fused.

Source: GMoE (arXiv 2206.04046), public code, commit 0689d557; ViT (2010.11929), DeiT (2012.12877) through timm.
Parity: LayerNorm epsilon 1e-6, class-token readout, exact GELU, stochastic depth from 0 in the first block, tokens
drawn from a truncated normal of 0.02; a distilled network averages its two heads in evaluation.

Shapes: B batch, N tokens per image, D width, K classes, h heads, E experts, C seats, H hidden width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import timm
from timm.layers import DropPath, trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from moe.errors import SpecError
from moe.layers.layer import LayerRecord, MoELayer
from moe.models.attention import attention_with_map
from moe.models.gmoe_spec import GMoESpec
from moe.models.surgery import WEIGHT_STD, sparsify


@dataclass(frozen=True)
class ViTShape:
    """Geometry of a pre-norm vision transformer with class token; the defaults are S/16.

    Attributes:
        image_size: side of the input in pixels.
        patch_size: side of a patch; must divide it.
        channels: of the input.
        dim: width D.
        depth: blocks.
        num_heads: h; must divide D.
        mlp_ratio: hidden width as a multiple of D, rounded down.
        qkv_bias: queries, keys and values have a bias.
        distilled: DeiT's distillation token and second head.
        drop_path: stochastic depth of the last block of a dense network; a sparse one takes its own spec's.
        norm_eps: epsilon of the layer norms.

    Raises:
        SpecError: sizes below 1 or that do not divide.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    distilled: bool = False
    drop_path: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)} must be at least 1.")
        if int(self.dim * self.mlp_ratio) < 1:
            raise SpecError(f"mlp_ratio={self.mlp_ratio} leaves no hidden unit at width {self.dim}.")
        if self.dim % self.num_heads:
            raise SpecError(f"num_heads={self.num_heads} does not divide dim={self.dim}.")
        if self.image_size % self.patch_size:
            raise SpecError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}.")


S16 = ViTShape()
B16 = ViTShape(dim=768, num_heads=12)


class BlockDraws(NamedTuple):
    """Random draws of one block, given from outside; what is None is drawn by the block itself. Training mode only.

    Attributes:
        noise: the gate's, see ``moe.layers.router.draw_noise``.
        dropout_mask: 0/1 ``[E, C, H]`` of the experts' hidden units.
        keep_attention_B: 0/1, images that keep the attention branch.
        keep_mlp_B: 0/1, images that keep the feed-forward branch.
    """

    noise: Tensor | None = None
    dropout_mask: Tensor | None = None
    keep_attention_B: Tensor | None = None
    keep_mlp_B: Tensor | None = None


class BlockOutput(NamedTuple):
    """What :func:`run_block` gives.

    Attributes:
        y_BND: the block's output.
        map_BhNN: attention probabilities, if asked for.
        record: routing of a sparse block, else None.
    """

    y_BND: Tensor
    map_BhNN: Tensor | None
    record: LayerRecord | None


class ViTOutput(NamedTuple):
    """What :func:`run_vit` gives; dictionaries are by block number.

    Attributes:
        logits_BK: of the class token; a distilled network in evaluation: mean of both heads.
        logits_dist_BK: of the distillation token, in training mode of a distilled network only.
        features_BD: input of the head (distilled: mean of both tokens).
        aux: weighted auxiliary losses of the sparse blocks.
        records: their routing.
        maps: attention probabilities ``[B, h, N, N]`` of the blocks asked for.
    """

    logits_BK: Tensor
    logits_dist_BK: Tensor | None
    features_BD: Tensor
    aux: dict[int, Tensor]
    records: dict[int, LayerRecord]
    maps: dict[int, Tensor]


NOTHING = BlockDraws()


def build_vit(shape: ViTShape, num_classes: int, gmoe: GMoESpec | None = None) -> VisionTransformer:
    """A randomly initialised network of this geometry, with sparse blocks when ``gmoe`` is given."""
    network = VisionTransformerDistilled if shape.distilled else VisionTransformer
    vit = network(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        in_chans=shape.channels,
        num_classes=num_classes,
        embed_dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=shape.mlp_ratio,
        qkv_bias=shape.qkv_bias,
        drop_path_rate=shape.drop_path if gmoe is None else gmoe.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
    )
    return _finish(vit, gmoe)


def gmoe_vit(
    name: str, num_classes: int, gmoe: GMoESpec | None = None, channels: int = 3, image_size: int | None = None
) -> VisionTransformer:
    """The network of a timm name, e.g. ``deit_small_patch16_224``, randomly initialised and made sparse.

    Args:
        name: a vision transformer of timm.
        num_classes: K.
        gmoe: which blocks, and how; the published GMoE when left out.
        channels: of the input.
        image_size: side in pixels; the name's own when left out.

    Raises:
        SpecError: timm does not know the name, or it is not a plain vision transformer.
    """
    if not timm.is_model(name):
        raise SpecError(f"timm has no model named {name!r}.", "See timm.list_models('*vit*') and '*deit*'.")
    spec = gmoe or GMoESpec()
    size = {} if image_size is None else {"img_size": image_size}
    vit = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=channels, drop_path_rate=spec.drop_path, **size
    )
    return _finish(vit, spec)


def run_block(block: Block, x_BND: Tensor, draws: BlockDraws = NOTHING, attention_map: bool = False) -> BlockOutput:
    """One transformer block, ``x + drop(attention(norm(x)))`` and then the same with its feed-forward network.

    Args:
        block: timm's block, dense or sparse.
        x_BND: tokens; a sparse block routes those of all images together.
        draws: given from outside.
        attention_map: also return the attention probabilities (and compute them the plain way).
    """
    normed = block.norm1(x_BND)
    attended, map_BhNN = attention_with_map(block.attn, normed) if attention_map else (block.attn(normed), None)
    x_BND = x_BND + _dropped(block.drop_path1, block.ls1(attended), draws.keep_attention_B)
    normed, record = block.norm2(x_BND), None
    if isinstance(block.mlp, MoELayer):
        mixed = block.mlp(normed, draws.noise, draws.dropout_mask)
        record = block.mlp.last
    else:
        mixed = block.mlp(normed)
    return BlockOutput(x_BND + _dropped(block.drop_path2, block.ls2(mixed), draws.keep_mlp_B), map_BhNN, record)


def run_vit(
    vit: VisionTransformer,
    images: Tensor,
    draws: Mapping[int, BlockDraws] | None = None,
    attention_maps: bool | Collection[int] = False,
) -> ViTOutput:
    """One pass with everything that it gives.

    Args:
        vit: dense or sparse.
        images: ``[B, C, side, side]``.
        draws: injected draws by block number.
        attention_maps: True for all blocks, or the numbers of the blocks whose maps are wanted.

    Raises:
        RunFailed: activations that reach a sparse block are not finite.
    """
    given = draws or {}
    wanted = range(len(vit.blocks)) if attention_maps is True else attention_maps or ()
    weight = vit.gmoe.aux_weight if isinstance(getattr(vit, "gmoe", None), GMoESpec) else 1.0
    x_BND = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    records: dict[int, LayerRecord] = {}
    maps: dict[int, Tensor] = {}
    for i, block in enumerate(vit.blocks):
        out = run_block(block, x_BND, given.get(i, NOTHING), i in wanted)
        x_BND = out.y_BND
        if out.record is not None:
            records[i] = out.record
        if out.map_BhNN is not None:
            maps[i] = out.map_BhNN
    logits_BK, dist_BK, features_BD = _heads(vit, vit.norm(x_BND))
    aux = {i: weight * record.balance for i, record in records.items()}
    return ViTOutput(logits_BK, dist_BK, features_BD, aux, records, maps)


def init_tokens(vit: VisionTransformer) -> None:
    """Draw class and distillation token as the positions are drawn (timm starts the class token near zero)."""
    for name in ("cls_token", "dist_token"):
        if getattr(vit, name, None) is not None:
            trunc_normal_(getattr(vit, name), std=WEIGHT_STD)


def _finish(vit: VisionTransformer, gmoe: GMoESpec | None) -> VisionTransformer:
    if gmoe is not None:
        sparsify(vit, gmoe)
    init_tokens(vit)
    return vit


def _heads(vit: VisionTransformer, x_BND: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits, second logits and features."""
    features_BD = vit.forward_head(x_BND, pre_logits=True)
    if not isinstance(vit, VisionTransformerDistilled):
        return vit.head(features_BD), None, features_BD
    first, second = vit.head(vit.head_drop(x_BND[:, 0])), vit.head_dist(vit.head_drop(x_BND[:, 1]))
    if vit.training:
        return first, second, features_BD
    return (first + second) / 2, None, features_BD


def _dropped(path: nn.Module, branch_BND: Tensor, keep_B: Tensor | None) -> Tensor:
    """Stochastic depth by timm's module, or by the given 0/1 per image."""
    if keep_B is None or not isinstance(path, DropPath) or not path.training:
        out: Tensor = path(branch_BND)
        return out
    scale_B = (keep_B / (1.0 - float(path.drop_prob))).to(branch_BND.dtype)
    return branch_BND * scale_B.view(-1, 1, 1)
