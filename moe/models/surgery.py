"""Surgery on vision transformers: feed-forward networks of chosen blocks become mixtures of experts, in place.

Works on any ``timm.models.vision_transformer.VisionTransformer`` (ViT, DeiT, DINO, distilled or not). The result still
is that class: its own ``forward`` runs it, and :func:`aux_loss` collects the auxiliary losses of the last pass.

Source: GMoE (arXiv 2206.04046, section 4.3) and public code, commit 0689d557.

Known differences: the experts' dropout belongs to the layer, so copies and pickles are independent (the public code
reaches it through the original block). Parity: raw experts without a checkpoint start like ``nn.Linear``, the gate's
projection like every other linear layer of the network (truncated normal, 0.02).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from timm.layers import Mlp, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moe.errors import SpecError
from moe.layers.layer import MoELayer
from moe.models.gmoe_spec import GMoESpec

WEIGHT_STD = 0.02


def sparsify(vit: VisionTransformer, spec: GMoESpec, experts: Literal["fresh", "copies"] = "fresh") -> None:
    """Replace the feed-forward networks that ``spec.pattern`` names.

    Args:
        vit: changed in place; a shape that ``vit.gmoe`` remembers.
        spec: which blocks, and how they route.
        experts: ``fresh`` weights, or ``copies`` of the network that each expert replaces (sparse upcycling).

    Raises:
        SpecError: not a vision transformer, blocks that are sparse already or have another feed-forward network than
            linear - GELU - linear, or a pattern that does not fit the depth.
    """
    if not isinstance(vit, VisionTransformer):
        raise SpecError(
            f"A {type(vit).__name__} has no blocks to make sparse.", "Choose a vision transformer, e.g. DeiT."
        )
    kinds = spec.kinds(len(vit.blocks))
    chosen = [(i, block) for i, (block, kind) in enumerate(zip(vit.blocks, kinds, strict=True)) if kind == "S"]
    for i, block in chosen:
        _check(i, block.mlp)
    for _, block in chosen:
        block.mlp = _moe(block.mlp, spec, experts)
    vit.gmoe = spec


def moe_layers(module: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers inside ``module`` by dotted name, in order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, MoELayer)}


def aux_loss(module: nn.Module) -> Tensor | None:
    """Weighted sum of the auxiliary losses of the last pass of every sparse network inside ``module``.

    Each counts with its network's ``aux_weight``. None when there is no sparse network.
    """
    terms = [weight * layer.last.balance for weight, layer in _weighted(module) if layer.last is not None]
    return torch.stack(terms).sum() if terms else None


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer as a vision transformer's are: truncated normal, bias 0. Other modules stay as they are."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _weighted(module: nn.Module) -> Iterator[tuple[float, MoELayer]]:
    for child in module.modules():
        spec = getattr(child, "gmoe", None)
        if isinstance(spec, GMoESpec):
            yield from ((spec.aux_weight, layer) for layer in moe_layers(child).values())


def _check(index: int, mlp: nn.Module) -> None:
    if isinstance(mlp, MoELayer):
        raise SpecError(f"Block {index} is sparse already.", "Make the network sparse once, with one pattern.")
    plain = (
        isinstance(mlp, Mlp)
        and isinstance(mlp.act, nn.GELU)
        and mlp.act.approximate == "none"
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.fc1, nn.Linear)
        and mlp.fc1.bias is not None
        and mlp.fc2.bias is not None
    )
    if not plain:
        raise SpecError(
            f"The feed-forward network of block {index} is a {type(mlp).__name__} of another form than linear - GELU - "
            "linear with biases.",
            "Experts are of this form; choose another backbone, or a pattern without this block.",
        )


def _moe(mlp: Mlp, spec: GMoESpec, experts: str) -> MoELayer:
    hidden, dim = mlp.fc1.weight.shape
    layer = MoELayer(dim, hidden, spec.router(), spec.num_experts, activation="gelu", dropout=spec.dropout)
    for module in layer.gate.modules():
        init_linear(module)
    layer = layer.to(mlp.fc1.weight).train(mlp.training)
    if experts == "copies":
        with torch.no_grad():
            for name, source in (
                ("w1", mlp.fc1.weight),
                ("b1", mlp.fc1.bias),
                ("w2", mlp.fc2.weight),
                ("b2", mlp.fc2.bias),
            ):
                getattr(layer.experts, name).copy_(source.expand_as(getattr(layer.experts, name)))
    return layer
