"""Core and universal experts: the first experts stay whole, the others keep an evenly spaced share of their neurons.

Source: MoE Jetpack (arXiv 2406.04801), section 3.3 (few large core experts, many small universal ones) and its public
code.

Shapes: E experts, C core, U universal, H hidden neurons, k kept neurons, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.conversion.recycle.indices import kept, uniform_list
from moe.conversion.recycle.layout import check_shape
from moe.conversion.recycle.weights import State
from moe.errors import CheckpointError, SpecError

_TENSORS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def thinned(hidden: int, factor: float, rounding: str = "round") -> Tensor:
    """Neurons that a universal expert keeps: ``int(hidden * factor)`` evenly spaced ones.

    Raises:
        SpecError: nothing or more than everything would be kept.
    """
    keep = kept(hidden, factor)
    if not 1 <= keep <= hidden:
        raise SpecError(f"A factor of {factor} leaves {keep} of {hidden} neurons.", "Use a factor in (0, 1].")
    return uniform_list(hidden, keep, rounding)


def split_dual_path(
    state: Mapping[str, Tensor],
    core: int,
    universal: int,
    factor: float,
    moe_blocks: Sequence[int],
    *,
    donor: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    matching: bool = True,
) -> State:
    """Split stacks of C + U experts into core and universal experts.

    Args:
        state: ``blocks.i.mlp.experts.vit_fc{1,2}.{weight,bias}`` with C + U experts; other tensors pass through.
        core: C.
        universal: U.
        factor: share of the neurons a universal expert keeps.
        moe_blocks: blocks to split.
        donor: dense network of the same width; when given, universal experts are drawn at random from its
            feed-forward layers instead.
        generator: source of those draws (CPU); needed with a donor.
        matching: Differs: one draw per universal expert, so that its tensors hold the same neurons. False is the
            public code, which draws anew for each of the four tensors (Parity).

    Returns:
        ``core_experts.*`` and ``universal`` ones as ``univ_experts.*`` in the place of ``experts.*``.

    Raises:
        CheckpointError: a stack is missing, or does not hold C + U experts of one size.
        SpecError: a count or factor is out of range, or a donor without generator.
    """
    if core < 0 or universal < 0 or core + universal < 1:
        raise SpecError(f"{core} core and {universal} universal experts cannot be split.")
    if donor is not None and universal < 1:
        raise SpecError("A donor of universal experts is given, but there are none.", "Leave the donor out.")
    if (donor is None) != (generator is None):
        raise SpecError("A donor of universal experts and a generator belong together.", "Give both or none.")
    blocks = sorted(set(moe_blocks))
    split = {name for block in blocks for name in _stacks(block)}
    missing = sorted(split - state.keys())
    if missing:
        raise CheckpointError(f"There are no experts to split: {', '.join(missing[:4])} are missing.")
    drawn = {} if donor is None or generator is None else _drawn(donor, blocks, universal, factor, generator, matching)
    out: State = {}
    for name, tensor in state.items():
        if name not in split:
            out[name] = tensor
            continue
        _check_stack(state, name, core + universal)
        hidden_axis = {"vit_fc1.weight": 1, "vit_fc1.bias": 1, "vit_fc2.weight": 2}.get(_ending(name))
        out[name.replace(".experts.", ".core_experts.")] = tensor[:core].clone()
        new = name.replace(".experts.", ".univ_experts.")
        if new in drawn:
            out[new] = drawn[new]
        elif hidden_axis is None:
            out[new] = tensor[core:].clone()
        else:
            out[new] = tensor[core:].index_select(hidden_axis, thinned(tensor.shape[hidden_axis], factor))
    return out


def _drawn(
    donor: Mapping[str, Tensor], blocks: Sequence[int], universal: int, factor: float, generator: Any, matching: bool
) -> State:
    """Universal experts out of a dense donor, each with neurons of its own."""
    out: State = {}
    for block in blocks:
        names = [f"blocks.{block}.mlp.{part}" for part in _TENSORS]
        missing = [name for name in names if name not in donor]
        if missing:
            raise CheckpointError(f"The donor lacks {', '.join(missing)}.", "It must be a plain dense ViT.")
        hidden, dim = len(donor[names[1]]), len(donor[names[3]])
        shapes = ((hidden, dim), (hidden,), (dim, hidden), (dim,))
        keep = len(thinned(hidden, factor))
        for name, shape in zip(names, shapes, strict=True):
            check_shape(donor[name], shape, name, "donor")

        def draw(hidden: int = hidden, keep: int = keep) -> list[Tensor]:
            lists = [torch.randperm(hidden, generator=generator)[:keep] for _ in range(universal)]
            return [units.sort().values for units in lists]

        lists = draw() if matching else []
        for part, name in zip(_TENSORS, names, strict=True):
            units = lists if matching else draw()
            axis = 1 if part == "fc2.weight" else 0
            rows = [donor[name] if part == "fc2.bias" else donor[name].index_select(axis, own) for own in units]
            out[f"blocks.{block}.mlp.univ_experts.vit_{part}"] = torch.stack(rows)
    return out


def _stacks(block: int) -> list[str]:
    return [f"blocks.{block}.mlp.experts.vit_{part}" for part in _TENSORS]


def _ending(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _check_stack(state: Mapping[str, Tensor], name: str, experts: int) -> None:
    """A stack agrees with the others of its block."""
    base = name.removesuffix(_ending(name))
    hidden, dim = state[f"{base}vit_fc1.bias"].shape[-1], state[f"{base}vit_fc2.bias"].shape[-1]
    shapes = {
        "vit_fc1.weight": (experts, hidden, dim),
        "vit_fc1.bias": (experts, hidden),
        "vit_fc2.weight": (experts, dim, hidden),
        "vit_fc2.bias": (experts, dim),
    }
    check_shape(state[name], shapes[_ending(name)], name, f"stack of {experts} experts")
