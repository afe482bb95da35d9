"""Adapters of MoE Jetpack's recycling operations: statistics, graphs, index lists, gathers, the whole chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe.conversion.recycle.dual_path import split_dual_path
from moe.conversion.recycle.graph import modularity, part_probabilities, partition
from moe.conversion.recycle.indices import ListPlan, graph_lists, importance_lists, kept, random_lists, uniform_lists
from moe.conversion.recycle.indices_v2 import NeuronPlan, neuron_lists
from moe.conversion.recycle.options import GraphOptions, RecycleOptions, StatisticsOptions
from moe.conversion.recycle.record import StatisticsRecord
from moe.conversion.recycle.recycle import recycle as project_recycle
from moe.conversion.recycle.recycle import stitch as project_stitch
from moe.conversion.recycle.statistics import StatisticsAccumulator
from moe.conversion.recycle.weights import UnitLists, size_name, stack_sizes
from moe.conversion.recycle.weights import select_weights as project_select_weights
from tests.golden.registry import op

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

LAYERS = 12
EVERY = ("L1", "L2", "act_patrn", "co_act")


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def by_layer(tensors: Tensors, prefix: str) -> dict[int, torch.Tensor]:
    """The tensors ``<prefix><layer>``, by layer."""
    return {int(layer): value for layer, value in sorted(below(tensors, prefix).items()) if layer.isdecimal()}


def seeded(params: Case) -> torch.Generator:
    return torch.Generator().manual_seed(params["seed"])


def listed(lists: dict[int, torch.Tensor], prefix: str = "out.idx.") -> Tensors:
    return {f"{prefix}{layer}": units for layer, units in lists.items()}


def statistics(params: Case, tensors: Tensors, options: StatisticsOptions) -> Tensors:
    accumulator = StatisticsAccumulator(options)
    for number in range(len(params["batch_sizes"])):
        for layer, activation in enumerate(tensors[f"in.batch{number}"].unbind(dim=1)):
            accumulator.add("place", layer, activation)
    return {f"out.{name.removeprefix('place.')}": v for name, v in accumulator.finalise().to_tensors().items()}


@op("jetpack.feature_stats")
def feature_stats(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    options = StatisticsOptions(metrics=EVERY, value=params["threshold"], group=params["group"])
    return statistics(params, tensors, options)


@op("jetpack.feature_stats_v2")
def feature_stats_v2(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    options = StatisticsOptions(
        metrics=EVERY,
        averaging="batch_sum",
        threshold=params["threshold_method"],
        percentile=params["percentile"],
    )
    return statistics(params, tensors, options)


@op("jetpack.graph_partition")
def graph_partition(case: Case, tensors: Tensors) -> Tensors:
    params, method = case["params"], case["params"]["method"]
    size = {"resolution": params["hyper"]} if method == "louvain" else {"parts": params["hyper"]}
    weights = "truncated" if params["weighted"] else "none"
    labels = partition(tensors["in.co_act"], GraphOptions(method=method, weights=weights, **size))
    # Ours number parts by their lowest node; `order` gives the stored label of each.
    stored = torch.tensor(params["order"])[labels]
    return {"out.part": stored, "out.modularity": torch.tensor(modularity(tensors["in.co_act"], labels))}


@op("jetpack.graph_prob")
def graph_prob(case: Case, tensors: Tensors) -> Tensors:
    ids, sizes, prob = part_probabilities(tensors["in.co_act"], tensors["in.part"])
    return {"out.subgraph_ids": ids, "out.sizes": sizes, "out.prob": prob}


def plan_of(params: Case) -> ListPlan:
    total = params["total_size"]
    keep, blocks = kept(total, params["subset_ratio"]), tuple(params["moe_blocks"])
    layers, shared = params.get("layers", LAYERS), params.get("select_channel", False)
    return ListPlan(total, keep, layers, blocks, params["num_experts"], shared)


@op("jetpack.indices_random")
def indices_random(case: Case, tensors: Tensors) -> Tensors:
    return listed(random_lists(plan_of(case["params"]), seeded(case["params"])))


@op("jetpack.indices_uniform")
def indices_uniform(case: Case, tensors: Tensors) -> Tensors:
    return listed(uniform_lists(plan_of(case["params"])))


@op("jetpack.indices_importance")
def indices_importance(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    metric = by_layer(tensors, f"in.{params['metric']}.")
    return listed(importance_lists(plan_of(params), metric, seeded(params)))


def given_labels(labels: Iterator[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: next(labels)


@op("jetpack.indices_graph")
def indices_graph(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    labels = by_layer(tensors, "in.part.call")
    lists, probabilities = graph_lists(
        plan_of(params),
        by_layer(tensors, "in.co_act."),
        seeded(params),
        given_labels(labels[call] for call in sorted(labels)),
        clusters=params["clusters"],
        top_up=False,
    )
    return listed(lists) | {f"out.prob.call{call}": prob for call, prob in enumerate(probabilities)}


@op("jetpack.indices_v2")
def indices_v2(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    plan = NeuronPlan(
        params["method"],
        params["total_size"],
        params["subset_ratio"],
        params["num_layers"],
        tuple(params["moe_layers"]),
        params["num_experts"],
        params["select_global"],
    )
    labels = by_layer(tensors, "in.part.")
    values = by_layer(tensors, f"in.{params['metric']}.")
    partitioner = given_labels(labels[layer] for layer in sorted(labels))
    lists, probabilities = neuron_lists(plan, seeded(params), values, partitioner)
    return listed(lists) | listed(probabilities, "out.prob.")


@op("jetpack.select_weights")
def select_weights(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    dense, moe = (
        UnitLists(*(by_layer(tensors, f"in.{part}_{kind}.") for kind in ("channel", "attn", "mlp")))
        for part in ("dense", "moe")
    )
    state = project_select_weights(
        below(tensors, "w."),
        dense,
        moe,
        params["moe_blocks"],
        unit=params["select_unit"],
        gated=params["is_glu"],
        merge_qkv=params.get("merge_qkv", False),
    )
    return {f"out.{name}": value for name, value in state.items()}


@op("jetpack.dualpath_split")
def dualpath_split(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    state = split_dual_path(
        below(tensors, "w."),
        params["core_experts"],
        params["univ_experts"],
        params["univ_factor"],
        params["moe_blocks"],
        donor=below(tensors, "in.dense.") if params["from_dense"] else None,
        generator=seeded(params) if params["from_dense"] else None,
        matching=False,
    )
    return {f"out.{name}": value for name, value in state.items()}


@op("jetpack.stitch")
def stitch(case: Case, tensors: Tensors) -> Tensors:
    target = below(tensors, "w.")
    ordered = {name: target[name] for name in case["params"].get("key_order", target)}
    state = project_stitch(ordered, below(tensors, "in.dense."), below(tensors, "in.vit."), check=False)
    return {f"out.{name}": value for name, value in state.items()}


@op("jetpack.stack_v2")
def stack_v2(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    names = [size_name(ratio) for ratio, _ in params["mapping"].values()]
    lists = {name: by_layer(tensors, f"in.idx.{name}.") for name in names}
    state = stack_sizes(below(tensors, "w."), lists, params["moe_layers"])
    return {f"out.{name}": value for name, value in state.items()}


@op("jetpack.recycle")
def recycle(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    measured = {
        name: value
        for place in ("mlp_act", "attn_proj", "norm2")
        for name, value in tensors.items()
        if name.startswith(f"in.{place}.")
    }
    made = project_recycle(
        below(tensors, "in.teacher."),
        below(tensors, "w."),
        RecycleOptions(select=params["select_type"]),
        generator=seeded(params),
        statistics=StatisticsRecord.from_tensors(below(measured, "in.")) if measured else None,
        donor=below(tensors, "in.dense."),
    )
    return {
        **{f"out.{name}": value for name, value in made.state.items()},
        **listed(made.experts.neuron, "out.idx.moe_mlp."),
        **listed(made.experts.channel, "out.idx.moe_channel."),
    }
