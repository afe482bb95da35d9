"""The last blocks of a vision transformer, and the frozen blocks before them.

With the front frozen and no random augmentation, what the front makes of an image never changes: it is computed once
(:func:`front_tokens`) and training starts from there, at the cost of the last blocks alone. The tail is an ordinary
backbone whose "image" is the token map of the front.

Shapes: B images, D width, T tokens (class token and patches).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moe.errors import SpecError


class VitTail(nn.Module):
    """Blocks ``first_block ..`` of ``model`` with its last norm and head; the modules are taken over, not copied.

    State-dict names: ``blocks.<i - first_block>.*``, ``norm.*``, ``head.*``.

    Args:
        model: a timm vision transformer that reads its class token.
        first_block: index of the first block that stays, 1 .. depth - 1.

    Raises:
        SpecError: another kind of network, or no such block.
    """

    def __init__(self, model: nn.Module, first_block: int) -> None:
        super().__init__()
        _check(model, first_block)
        self.pretrained_cfg = {"classifier": "head"}
        self.blocks = nn.Sequential(*list(model.get_submodule("blocks").children())[first_block:])
        self.norm = model.get_submodule("norm")
        self.head = model.get_submodule("head")

    def forward(self, x_BDT1: Tensor) -> Tensor:
        """Logits ``[B, K]`` of token maps ``[B, D, T, 1]``."""
        tokens_BTD = x_BDT1.flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.norm(self.blocks(tokens_BTD))[:, 0])
        return out


def front_tokens(model: nn.Module, first_block: int, images: Tensor) -> Tensor:
    """What the blocks before ``first_block`` make of images ``[B, C, H, W]``: ``[B, D, T, 1]``, without gradients.

    Raises:
        SpecError: as :class:`VitTail`.
    """
    _check(model, first_block)
    with torch.no_grad():
        patches = model.get_submodule("patch_embed")(images)
        x_BTD: Tensor = model.get_submodule("norm_pre")(cast("VisionTransformer", model)._pos_embed(patches))
        for block in list(model.get_submodule("blocks").children())[:first_block]:
            x_BTD = block(x_BTD)
    return x_BTD.transpose(1, 2).unsqueeze(-1).contiguous()


def tail_state(state: Mapping[str, Tensor], first_block: int) -> dict[str, Tensor]:
    """The part of a whole transformer's state that a :class:`VitTail` has, under the tail's names."""
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            number, _, rest = rest.partition(".")
            if int(number) >= first_block:
                kept[f"blocks.{int(number) - first_block}.{rest}"] = value
        elif part in ("norm", "head"):
            kept[name] = value
    return kept


def _check(model: nn.Module, first_block: int) -> None:
    if not isinstance(model, VisionTransformer) or model.global_pool != "token":
        raise SpecError(
            f"first_block needs a vision transformer that reads its class token, and this is a {type(model).__name__}.",
            "Use vit_small_focus or a ViT of timm, or leave first_block out.",
        )
    depth = len(list(model.get_submodule("blocks").children()))
    if not 1 <= first_block < depth:
        raise SpecError(f"first_block={first_block} with {depth} blocks.", "Use 1 .. depth - 1.")
