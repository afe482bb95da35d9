"""The dense counterpart of a recycled successor: the same cut of the predecessor (or the same donor), without experts.

It is the baseline that says what the experts add: embeddings, attention and norms start with exactly the numbers of the
successor, and each feed-forward network is one selection of the predecessor's neurons. Source: MoE Jetpack (arXiv
2406.04801), section 3.2, where the dense part of a successor is cut like this; Weight Selection (2311.18823).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.conversion.recycle.layout import SuccessorLayout, block_name, read_dense
from moe.conversion.recycle.options import RecycleOptions
from moe.conversion.recycle.recycle import check_rest, layer_map, stitch, with_inherited_norms, with_layers
from moe.conversion.recycle.weights import State, UnitLists, select_dense


def recycle_dense(
    successor: Mapping[str, Tensor],
    options: RecycleOptions,
    *,
    predecessor: Mapping[str, Tensor],
    lists: UnitLists | None,
    donor: Mapping[str, Tensor] | None = None,
) -> State:
    """Starting weights of a dense network; head and what the other networks lack keep the successor's values.

    Args:
        successor: freshly initialised dense network.
        options: of the recycling.
        predecessor: dense vision transformer, timm names.
        lists: ``Recycled.dense`` of the successor with experts; not used with a donor.
        donor: dense network of the successor's width, if the recycling had one.

    Raises:
        CheckpointError: missing or wrongly shaped tensors.
    """
    depth = 1 + max(place[0] for place in map(block_name, successor) if place is not None)
    if donor is not None or lists is None:
        rest, origin = dict(donor or {}), "donor"
    else:
        layers = layer_map(depth, read_dense(predecessor, "predecessor").depth, options.depth)
        rest, origin = select_dense(with_layers(predecessor, layers), lists, ()), "predecessor"
    if options.inherit_norms:
        rest = with_inherited_norms(rest, SuccessorLayout(read_dense(successor, "successor").dim, depth, ()))
    check_rest(successor, rest, origin)
    return stitch(successor, rest, {})
