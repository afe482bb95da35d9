"""Adapters of EMoE's conversion operations: splitting, assigning, gathering, graphs and layer choice.

Several answers are right in some contracts (any renaming of the groups, any optimal labelling); those bring a check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moe.conversion.balanced import assign
from moe.conversion.coactivation import coactivation_graph, rebalance
from moe.conversion.split import DenseFFN, gather_experts, split_keys, split_objective
from moe.layers.gates import key_means
from moe.models.emoe_layers import llama_layers, vision_layers
from moe.models.swiglu import permute_swiglu
from tests.golden.registry import check, op
from tests.golden.replay import compare

Case = dict[str, Any]


@op("emoe.split_keys")
def split(case: Case, tensors: Case) -> Case:
    params = case["params"]
    labels = split_keys(
        tensors["in.keys"], params["num_experts"], seed=params["random_state"], restarts=params["n_init"]
    )
    return {"out.labels": labels, "out.inertia": torch.tensor([split_objective(tensors["in.keys"], labels)])}


@check("emoe.split_keys")
def same_partition(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    params, labels = case["params"], outputs["out.labels"]
    sizes = torch.bincount(labels, minlength=params["num_experts"])
    if not bool((sizes == labels.numel() // params["num_experts"]).all()):
        yield f"out.labels: sizes {sizes.tolist()}"
    limit = params["max_inertia_ratio"] * float(tensors["out.inertia"])
    if params["check"] == "inertia" and float(outputs["out.inertia"]) > limit:
        yield f"out.inertia: {float(outputs['out.inertia']):.6g} is more than {limit:.6g}"
    if params["check"] == "partition":
        pairs = torch.stack([labels, tensors["out.labels"]]).unique(dim=1)
        if pairs.shape[1] != params["num_experts"]:
            yield f"out.labels: another partition ({pairs.shape[1]} pairs of groups overlap)"


@op("emoe.balanced_assignment")
def balanced_assignment(case: Case, tensors: Case) -> Case:
    params = case["params"]
    labels, cost = assign(
        tensors["in.points"].numpy(), tensors["in.centers"].numpy(), params["size_min"], params["size_max"]
    )
    return {"out.labels": torch.from_numpy(labels), "out.total_cost": torch.tensor([cost])}


@check("emoe.balanced_assignment")
def same_cost(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    params = case["params"]
    sizes = torch.bincount(outputs["out.labels"], minlength=params["num_experts"])
    if not bool(((sizes >= params["size_min"]) & (sizes <= params["size_max"])).all()):
        yield f"out.labels: sizes {sizes.tolist()}"
    points, centers = tensors["in.points"].double(), tensors["in.centers"].double()
    distance = (points - centers[outputs["out.labels"]]).norm(dim=1)
    if abs(int((1000 * distance).round().sum()) - int(outputs["out.total_cost"])) > 2:
        yield "out.total_cost: not the cost of the labels"
    if abs(int(outputs["out.total_cost"]) - int(tensors["out.total_cost"])) > 2:
        yield f"out.total_cost: {int(outputs['out.total_cost'])} instead of {int(tensors['out.total_cost'])}"


@op("emoe.coactivation_graph")
def graph(case: Case, tensors: Case) -> Case:
    edges = coactivation_graph(tensors["in.keys"], tensors["in.hidden"], **case["params"])
    return {"out.edges": edges, "out.num_edges": torch.tensor([int((edges > 0).sum()) // 2])}


@check("emoe.coactivation_graph")
def same_edges(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    mine, stored = outputs["out.edges"], tensors["out.edges"].to(torch.int64)
    if mine.shape != stored.shape or not torch.equal(mine, mine.t()):
        yield f"out.edges: shape {tuple(mine.shape)}, or not symmetric"
        return
    differing = (mine != stored).nonzero()
    # An entry may differ by one only where the quotient lies at the edge of an integer: moving the threshold by 1e-4
    # of a quotient must then be able to explain it.
    largest = max(1, int(stored.max()))
    for scale in (1 - 1e-4 / largest, 1 + 1e-4 / largest):
        factor = case["params"]["threshold_factor"] * scale
        near = coactivation_graph(
            tensors["in.keys"], tensors["in.hidden"], **case["params"] | {"threshold_factor": factor}
        )
        differing = differing[(near != stored)[differing[:, 0], differing[:, 1]]]
    if len(differing):
        yield f"out.edges: {len(differing)} entries differ, first at {differing[0].tolist()}"
    exact = torch.equal(mine, stored)
    if exact and int(outputs["out.num_edges"]) != int(tensors["out.num_edges"]):
        yield f"out.num_edges: {int(outputs['out.num_edges'])} instead of {int(tensors['out.num_edges'])}"


@op("emoe.rebalance")
def balance(case: Case, tensors: Case) -> Case:
    before, groups = tensors["in.labels"], case["params"]["num_experts"]
    after = rebalance(before, groups, torch.Generator().manual_seed(0))
    return {
        "out.labels": after,
        "out.sizes": torch.bincount(after, minlength=groups),
        "out.num_moved": (after != before).sum().view(1),
    }


@check("emoe.rebalance")
def kept_members(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    before, after = tensors["in.labels"], outputs["out.labels"]
    small = (
        torch.bincount(before, minlength=case["params"]["num_experts"]) <= len(before) // case["params"]["num_experts"]
    )
    if bool((small[before] & (before != after)).any()):
        yield "out.labels: members of a group at or below the target moved"
    free = {key: value for key, value in tensors.items() if key in ("out.sizes", "out.num_moved")}
    yield from compare(case, free, {key: outputs[key] for key in free})


@op("emoe.gather_experts")
def gather(case: Case, tensors: Case) -> Case:
    params = case["params"]
    dense = DenseFFN.from_tensors(
        *(tensors[f"w.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")), params["layout"]
    )
    count = params["num_experts"]
    contiguous = params["split"] == "contiguous"
    labels = split_keys(dense.keys_FD, count, "contiguous") if contiguous else tensors.get("in.labels")
    experts = gather_experts(
        dense, labels, count, params["top_k"], params["expert_repeat"], copy=params["split"] == "copy"
    )
    return {
        "out.batched_fc1_w": experts.fc1_EsD,
        "out.batched_fc1_bias": experts.bias_Es,
        "out.batched_fc2_w": experts.fc2_EsD,
        "out.batched_fc2_bias": experts.bias_ED,
        "out.gate": key_means(experts.fc1_EsD),
    }


@check("emoe.gather_experts")
def gate_where_present(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    yield from compare(case, tensors, {k: v for k, v in outputs.items() if k != "out.gate" or k in tensors})


@op("emoe.llama_rearrange")
def rearrange(case: Case, tensors: Case) -> Case:
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    return {f"out.{key}": value for key, value in permute_swiglu(weights, tensors["in.labels"]).items()}


@op("emoe.llama_layers")
def choose_llama_layers(case: Case, tensors: Case) -> Case:
    return {"out.layers": torch.tensor(llama_layers(**case["params"]), dtype=torch.int64)}


@op("emoe.vision_layers")
def choose_vision_layers(case: Case, tensors: Case) -> Case:
    layers = vision_layers(**case["params"])
    return {
        "out.layers": torch.tensor(layers, dtype=torch.int64),
        "out.pattern_length": torch.tensor([case["params"]["num_layers"]]),
    }
