"""ConvNeXt with layers of slots (MoE Jetpack's C-JetMoE): the map inside a block is its tokens.

A ConvNeXt block normalises its map with channels last and applies two pointwise maps; a layer of slots takes their
place and treats the h x w positions as tokens.

Source: MoE Jetpack (arXiv 2406.04801, C-JetMoE-F); ConvNeXt (2201.03545) through timm. Known differences: the public
code holds no ConvNeXt, so depths (3, 3, 9, 3) and widths (48, 96, 192, 384) are inferred from the numbers of the paper:
blocks 10-18 of 18 carry slots, 98 + 196 experts on the 14 x 14 maps of the third stage, 24 + 48 on the 7 x 7 of the
last.
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import nn

from moe.errors import SpecError
from moe.jet_specs import JetConvNeXtSpec
from moe.jetpack_specs import SpheroSpec, released_slots
from moe.layers.slots import SlotLayer
from moe.models.sphero_vit import SlotSpecs, make_slots

FEMTO_DEPTHS = (3, 3, 9, 3)
FEMTO_DIMS = (48, 96, 192, 384)


def convnext_blocks(model: nn.Module) -> list[ConvNeXtBlock]:
    """The blocks of all stages in order of execution.

    Raises:
        SpecError: not a ConvNeXt of timm.
    """
    if not isinstance(model, ConvNeXt):
        raise SpecError(f"A {type(model).__name__} is not a ConvNeXt.", "Choose timm's convnext_*.")
    return [block for stage in model.stages for block in stage.blocks]


def insert_slots(model: nn.Module, layers: Mapping[int, SlotSpecs]) -> None:
    """Replace the pointwise maps of blocks by layers of slots, in place.

    Args:
        model: a ConvNeXt of timm that keeps channels last inside its blocks (``conv_mlp=False``).
        layers: block number, from 0 over all stages -> what it carries.

    Raises:
        SpecError: not such a network, a block that does not exist or carries slots already.
    """
    blocks = convnext_blocks(model)
    for index, spec in layers.items():
        if not 0 <= index < len(blocks):
            raise SpecError(f"There is no block {index}.", f"Blocks run from 0 to {len(blocks) - 1}.")
        block = blocks[index]
        if isinstance(block.mlp, SlotLayer):
            raise SpecError(f"Block {index} carries slots already.", "Insert them once.")
        if block.use_conv_mlp:
            raise SpecError(
                f"Block {index} keeps channels first (conv_mlp=True).", "Build the network with conv_mlp=False."
            )
        weight = block.norm.weight
        block.mlp = make_slots(weight.shape[0], spec).to(weight).train(block.training)


def c_jetmoe_slots(image_size: int = 224, experts: float = 0.5) -> dict[int, SpheroSpec]:
    """What blocks 10-18 (9-17 from 0) of C-JetMoE-F carry: per stage, as many universal experts as tokens.

    Args:
        image_size: side of the input in pixels; a multiple of 32.
        experts: core experts as a share of the tokens.

    Raises:
        SpecError: an image size that is not a multiple of 32.
    """
    if image_size % 32 or image_size < 32:
        raise SpecError(f"image_size={image_size} is not a multiple of 32.", "ConvNeXt halves it five times.")
    slots = {}
    for stage, blocks in ((16, range(9, 15)), (32, range(15, 18))):
        tokens = (image_size // stage) ** 2
        core = max(1, int(tokens * experts))
        # 49 tokens give 24 core and 48 universal experts in the paper, 196 tokens 98 and 196.
        own = released_slots(tokens).model_copy(
            update={"core_experts": core, "univ_experts": 2 * core, "noise_mult": 1 / (3 * core)}
        )
        slots.update(dict.fromkeys(blocks, own))
    return slots


def build_c_jetmoe(
    num_classes: int,
    slots: Mapping[int, SlotSpecs] | None = None,
    drop_path: float = 0.1,
    dims: tuple[int, ...] = FEMTO_DIMS,
    depths: tuple[int, ...] = FEMTO_DEPTHS,
) -> ConvNeXt:
    """A randomly initialised C-JetMoE-F.

    Args:
        num_classes: K.
        slots: as of :func:`insert_slots`; the paper's for 224 pixels when None, an empty mapping for the dense network.
        drop_path: stochastic depth of the last block.
        dims: widths of the stages.
        depths: blocks of the stages.
    """
    model = ConvNeXt(num_classes=num_classes, depths=depths, dims=dims, drop_path_rate=drop_path)
    chosen = c_jetmoe_slots() if slots is None else slots
    total = sum(depths) - 1
    insert_slots(
        model,
        {i: spec.model_copy(update={"drop_path": spec.drop_path * i / max(1, total)}) for i, spec in chosen.items()},
    )
    return model


def build_jet_convnext(spec: JetConvNeXtSpec, num_classes: int) -> ConvNeXt:
    """A randomly initialised network.

    Args:
        spec: geometry and slots.
        num_classes: K.
    """
    model = ConvNeXt(
        in_chans=spec.channels,
        num_classes=num_classes,
        depths=spec.depths,
        dims=spec.dims,
        ls_init_value=spec.init_values,
        drop_path_rate=spec.drop_path,
    )
    insert_slots(model, {block: spec.layer_spec(block) for block in spec.moe_layers})
    return model
