"""Parameter groups: what decays, and how the rate falls towards the input.

The rule of DeiT and m2mKD (public code, ``optim_factory.py``): no decay for 1-d tensors, biases whatever their shape,
class token and positions; everything else decays. Parity: 0-d tensors (gains, bandwidths) decay. timm's
``param_groups_weight_decay`` spares them, and knows no stacked expert biases, so the rule is written out here.

Layer-wise decay: BEiT (arXiv 2106.08254), ViTDet (2203.16527): block i of n gets ``lr * decay ** (n - i)``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from moe.algorithms.base import Group
from moe.errors import SpecError

NO_DECAY_NAMES = ("pos_embed", "cls_token")
_BIAS = re.compile(r"(.*\.)?(bias|experts\.b[12])")
_BLOCK = re.compile(r"(?:.*\.)?blocks\.(\d+)\.")
_FIRST = ("cls_token", "pos_embed", "patch_embed")


def decays(name: str, parameter: nn.Parameter, no_decay: Collection[str] = NO_DECAY_NAMES) -> bool:
    """Whether weight decay applies to a parameter.

    Args:
        name: in the module, e.g. ``blocks.0.mlp.experts.b1``.
        parameter: its shape decides.
        no_decay: last parts of names that never decay.
    """
    return parameter.ndim != 1 and not _BIAS.fullmatch(name) and name.rsplit(".", 1)[-1] not in no_decay


def decay_groups(
    module: nn.Module, lr: float, weight_decay: float, no_decay: Collection[str] = NO_DECAY_NAMES
) -> list[Group]:
    """The trainable parameters as groups ``decay`` and ``no_decay``; an empty group is left out."""
    groups = [Group("decay", [], lr, weight_decay), Group("no_decay", [], lr, 0.0)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[0 if decays(name, parameter, no_decay) else 1].parameters.append(parameter)
    return [group for group in groups if group.parameters]


def layer_decay_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    depth: int,
    no_decay: Collection[str] = NO_DECAY_NAMES,
) -> list[Group]:
    """Groups whose rate falls by ``layer_decay`` per block from the output to the input.

    Args:
        module: a network with ``blocks.<i>.``; class token, positions and patch embedding count as layer 0, block i as
            layer i + 1, everything else (norm, head) as layer ``depth + 1``.
        lr: rate of the last layer.
        weight_decay: of the parameters that decay.
        layer_decay: factor per layer, in (0, 1]; 1 gives every layer the same rate.
        depth: number of blocks n.
        no_decay: see :func:`decays`.

    Raises:
        SpecError: the factor is out of range, or a block has a number beyond ``depth``.
    """
    if not 0 < layer_decay <= 1:
        raise SpecError(f"layer_decay is {layer_decay}.", "It lies above 0 and is at most 1.")
    groups: dict[tuple[int, bool], Group] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decay = _layer(name, depth), decays(name, parameter, no_decay)
        if (layer, decay) not in groups:
            label = f"layer{layer}/{'decay' if decay else 'no_decay'}"
            rate = lr * layer_decay ** (depth + 1 - layer)
            groups[layer, decay] = Group(label, [], rate, weight_decay if decay else 0.0)
        groups[layer, decay].parameters.append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer(name: str, depth: int) -> int:
    found = _BLOCK.match(name)
    if not found:
        return 0 if any(part in name.split(".") for part in _FIRST) else depth + 1
    if int(found[1]) >= depth:
        raise SpecError(f"{name} is block {found[1]} of a network said to have {depth}.", "Give the network's depth.")
    return int(found[1]) + 1
