"""All index lists of one recycling, in the order of the released tool's draws.

Order (Parity): channels, attention rows and neurons of the experts, then the same three of the dense part. A seed thus
gives the lists of the public code, including draws that nobody uses.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2, and its public code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe.conversion.recycle.graph import partition
from moe.conversion.recycle.indices import (
    ListPlan,
    Lists,
    graph_lists,
    importance_lists,
    random_lists,
    uniform_lists,
)
from moe.conversion.recycle.options import RecycleOptions
from moe.conversion.recycle.record import StatisticsRecord
from moe.conversion.recycle.weights import UnitLists
from moe.errors import SpecError

PLACE_OF = {"channel": "norm2", "attention": "attn_proj", "neuron": "mlp_act"}
"""Kind of unit -> place whose statistics judge it."""


@dataclass(frozen=True)
class Widths:
    """Units there are and units that survive, of one kind."""

    total: int
    keep: int


@dataclass(frozen=True)
class Wanted:
    """What a recycling needs lists for: widths by kind, number of layers, blocks with experts, experts per block."""

    channel: Widths
    attention: Widths
    neuron: Widths
    layers: int
    moe_blocks: tuple[int, ...]
    experts: int

    def plan(self, kind: str) -> ListPlan:
        """The experts' lists of one kind (``channel``, ``attention``, ``neuron``)."""
        widths: Widths = getattr(self, kind)
        return ListPlan(widths.total, widths.keep, self.layers, self.moe_blocks, self.experts)


def recycling_lists(
    wanted: Wanted,
    options: RecycleOptions,
    statistics: StatisticsRecord | None,
    generator: torch.Generator,
    *,
    dense: bool,
) -> tuple[UnitLists, UnitLists | None]:
    """Lists of the experts (``[E, k]`` for blocks with experts) and, if ``dense``, of the dense part (``[k]``).

    Args:
        wanted: widths and counts.
        options: how to choose.
        statistics: by layer of ``wanted``; not needed for random, uniform and copy.
        generator: source of all draws (CPU).
        dense: whether the dense part is cut out of the predecessor too.

    Raises:
        SpecError: statistics are missing, or ``copy`` with unequal sizes.
        DataError: statistics of other sizes.
    """
    draw = _drawer(options, statistics, generator)
    graph = options.select == "co_act"

    def of_dense(kind: str) -> Lists:
        return draw(kind, replace(wanted.plan(kind), experts=1, shared=kind == "channel"))

    common: Lists | None = None
    if options.channels == "shared_topk":
        common = of_dense("channel")
        channel = {b: common[b].expand(wanted.experts, -1).clone() for b in wanted.moe_blocks}
    else:
        channel = draw("channel", wanted.plan("channel"))
    # The experts' attention rows are drawn for the sake of the order alone; a graph would be partitioned for nothing.
    attention = {} if graph else draw("attention", wanted.plan("attention"))
    neuron = draw("neuron", wanted.plan("neuron"))
    experts = UnitLists(*(_only(lists, wanted.moe_blocks) for lists in (channel, attention, neuron)))
    if not dense:
        return experts, None
    return experts, UnitLists(common or of_dense("channel"), of_dense("attention"), of_dense("neuron"))


def _drawer(
    options: RecycleOptions, statistics: StatisticsRecord | None, generator: torch.Generator
) -> Callable[[str, ListPlan], Lists]:
    """The selection method as a function of kind and plan."""
    if options.select == "random":
        return lambda _, plan: random_lists(plan, generator)
    if options.select == "uniform":
        return lambda _, plan: uniform_lists(plan, options.rounding)
    if options.select == "copy":
        return lambda kind, plan: _everything(kind, plan)
    if statistics is None:
        raise SpecError(
            f"select={options.select!r} needs activation statistics of the predecessor.",
            "Collect them (probe.collect_statistics), or use random or uniform.",
        )
    record = statistics
    if options.select != "co_act":
        return lambda kind, plan: importance_lists(plan, record.of(PLACE_OF[kind], options.select), generator)

    def by_graph(kind: str, plan: ListPlan) -> Lists:
        co_act = record.of(PLACE_OF[kind], "co_act")
        if plan.expert_layers:  # no list is drawn for layers that need none: each costs a partition
            co_act = {layer: co_act[layer] for layer in plan.expert_layers if layer in co_act}
        clusters = options.graph.parts
        return graph_lists(plan, co_act, generator, lambda g: partition(g, options.graph), clusters=clusters)[0]

    return by_graph


def _everything(kind: str, plan: ListPlan) -> Lists:
    if plan.keep != plan.total:
        raise SpecError(
            f"select='copy' keeps everything, but the successor has {plan.keep} of {plan.total} {kind} units.",
            "Use a successor of the predecessor's size, or another selection.",
        )
    return uniform_lists(plan)


def _only(lists: Lists, blocks: tuple[int, ...]) -> Lists:
    """The lists of blocks with experts, always ``[E, k]`` (a single expert has been drawn as ``[k]``)."""
    return {block: lists[block].reshape(-1, lists[block].shape[-1]) for block in blocks if block in lists}
