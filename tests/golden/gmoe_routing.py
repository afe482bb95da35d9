"""Adapters of GMoE's gates, routing, auxiliary losses and layer (Tutel's names and shapes, choices by rank first)."""

from __future__ import annotations

import math
from typing import Any

import torch

from moe.layers.balance import gshard_loss as project_gshard_loss
from moe.layers.balance import load_importance_loss as project_load_importance_loss
from moe.layers.dispatch import Dispatch, combine, dispatch
from moe.layers.gates import CosineGate, LinearGate
from moe.layers.layer import MoELayer
from moe.layers.router import Routing, route_scores
from moe.layers.seating import count_choices, official_load
from moe.router_spec import RouterSpec
from tests.golden.registry import op

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

GATE_NAMES = {
    "wg.weight": "weight",
    "cosine_projector.weight": "projector.weight",
    "cosine_projector.bias": "projector.bias",
    "sim_matrix": "sim_matrix",
    "temperature": "temperature",
}
EXPERT_NAMES = {
    "batched_fc1_w": "w1",
    "batched_fc1_bias": "b1",
    "batched_fc2_w": "w2",
    "batched_fc2_bias": "b2",
}


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that collects a gradient."""
    return tensor.clone().requires_grad_()


def grad(tensor: torch.Tensor) -> torch.Tensor:
    """Its gradient; zeros where the objective does not depend on it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def transposed(name: str, value: torch.Tensor) -> torch.Tensor:
    """Official fc2 is [E, H, D], ours [E, D, H]."""
    return value.transpose(1, 2).contiguous() if name.endswith("batched_fc2_w") else value


def layer_names(state: Tensors) -> dict[str, str]:
    """Official parameter name below ``w.`` -> name inside MoELayer."""
    names: dict[str, str] = {}
    for key in state:
        if key.startswith("w.gates.0."):
            names[key[2:]] = "gate." + GATE_NAMES[key.removeprefix("w.gates.0.")]
        elif key.startswith("w.experts."):
            names[key[2:]] = "experts." + EXPERT_NAMES[key.removeprefix("w.experts.")]
    return names


def load_layer(spec: RouterSpec, tensors: Tensors, activation: str, dropout: float = 0.0) -> MoELayer:
    """The project's layer with the official weights of a case, every one of them trainable."""
    experts, hidden, dim = tensors["w.experts.batched_fc1_w"].shape
    layer = MoELayer(dim, hidden, spec, experts, activation, dropout)
    state = {ours: transposed(theirs, tensors[f"w.{theirs}"]) for theirs, ours in layer_names(tensors).items()}
    layer.load_state_dict(state)
    return layer.requires_grad_()


def layer_gradients(layer: MoELayer, tensors: Tensors) -> Tensors:
    """Gradients under official names and shapes."""
    return {
        f"out.grad.{theirs}": transposed(theirs, grad(layer.get_parameter(ours)))
        for theirs, ours in layer_names(tensors).items()
    }


def gate_outputs(gate: torch.nn.Module, tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Logits and gradients of a gate whose parameters have official names."""
    gate.load_state_dict({ours: tensors[f"w.{theirs}"] for theirs, ours in names.items()})
    x = leaf(tensors["in.x"])
    logits = gate(x)
    logits.backward(tensors["in.cotangent"])
    gradients = {f"out.grad.{theirs}": grad(gate.get_parameter(ours)) for theirs, ours in names.items()}
    return {"out.logits": logits, "out.scores": logits.softmax(-1), "out.grad.x": x.grad, **gradients}


@op("gmoe.cosine_gate")
def cosine_gate(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    gate = CosineGate(p["model_dim"], p["num_experts"], p["proj_dim"], max_scale=math.exp(p["clamp_max"]))
    return gate_outputs(gate, tensors, {name: ours for name, ours in GATE_NAMES.items() if name != "wg.weight"})


@op("gmoe.linear_gate")
def linear_gate(case: Case, tensors: Tensors) -> Tensors:
    gate = LinearGate(case["params"]["model_dim"], case["params"]["num_experts"])
    return gate_outputs(gate, tensors, {"wg.weight": "weight"})


@op("gmoe.topk_routing")
def topk_routing(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    scores = leaf(tensors["in.scores"])
    spec = RouterSpec(
        top_k=p["top_k"],
        capacity_factor=p["capacity_factor"],
        batch_prioritized=p["batch_prioritized_routing"],
        normalize_gates=p["normalize_gate"],
        alignment=p["alignment"],
        official_load=True,
    )
    routing = route_scores(scores, spec, spec.capacity_factor)
    experts = scores.shape[1]
    if spec.batch_prioritized:
        load = official_load(routing.experts_NK, routing.seats_NK, experts)
    else:
        load = count_choices(routing.experts_NK, experts)
    (routing.gates_NK.t() * tensors["in.cotangent"]).sum().backward()
    return {
        "out.indices": routing.experts_NK.t(),
        "out.locations": routing.seats_NK.t(),
        "out.gates": routing.gates_NK.t(),
        "out.capacity": routing.capacity,
        "out.dispatch_count": load,
        "out.kept": routing.kept_NK.t().long(),
        "out.grad.scores": grad(scores),
    }


def stored_routing(tensors: Tensors, gates: torch.Tensor, capacity: int, experts: int) -> Routing:
    """The routing that a dispatch case was made with."""
    indices, locations = tensors["in.indices"].t(), tensors["in.locations"].t()
    kept = locations < capacity
    counts = count_choices(indices.masked_fill(~kept, experts), experts + 1)[:experts]
    return Routing(indices, gates.t() * kept, kept, gates.new_zeros(()), counts, gates.t(), locations)


def slot_rows(sent: Dispatch, routing: Routing, capacity: int) -> torch.Tensor:
    """Row of each dispatched token in the official table [E * C, ...]."""
    return (routing.experts_NK * capacity + routing.seats_NK).flatten()[sent.choice_M]


@op("gmoe.dispatch_combine")
def dispatch_combine(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    capacity, after = p["capacity"], p["is_postscore"]
    x, gates, expert_out = (leaf(tensors[f"in.{name}"]) for name in ("x", "gates", "expert_out"))
    routing = stored_routing(tensors, gates, capacity, len(expert_out))
    sent = dispatch(x, routing, weights_NK=None if after else routing.weights_NK)
    rows = slot_rows(sent, routing, capacity)
    dispatched = x.new_zeros(expert_out.shape).flatten(0, 1).index_copy(0, rows, sent.tokens_MD).view_as(expert_out)
    weights = routing.weights_NK if after else routing.kept_NK.to(x.dtype)
    combined = combine(expert_out.flatten(0, 1).index_select(0, rows), sent, weights)
    total = (dispatched * tensors["in.cotangent_dispatched"]).sum() + (
        combined * tensors["in.cotangent_combined"]
    ).sum()
    total.backward()
    return {
        "out.dispatched": dispatched,
        "out.combined": combined,
        "out.grad.x": grad(x),
        "out.grad.expert_out": grad(expert_out),
        "out.grad.gates_decode" if after else "out.grad.gates_encode": grad(gates),
    }


@op("gmoe.gshard_loss")
def gshard_loss(case: Case, tensors: Tensors) -> Tensors:
    scores = leaf(tensors["in.scores"])
    loss = project_gshard_loss(scores, tensors["in.topk_ids"])
    loss.backward()
    return {"out.loss": loss, "out.grad.scores": grad(scores)}


@op("gmoe.load_importance_loss")
def load_importance_loss(case: Case, tensors: Tensors) -> Tensors:
    scores, logits = leaf(tensors["in.scores_wo_noise"]), leaf(tensors["in.topk_logits"])
    loss = project_load_importance_loss(scores, logits[:, -1], case["params"]["gate_noise"])
    loss.backward()
    return {"out.loss": loss, "out.grad.scores_wo_noise": grad(scores), "out.grad.topk_logits": grad(logits)}


@op("gmoe.moe_layer")
def moe_layer(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    spec = RouterSpec(
        gate=p["gate"],
        top_k=min(p["top_k"], p["num_experts"]),
        capacity_factor=p["capacity_factor"],
        eval_capacity=True,
        batch_prioritized=p["batch_prioritized_routing"],
        normalize_gates=p["normalize_gate"],
        official_load=True,
        pre_score=not p["is_postscore"],
        noise=p["gate_noise"],
        balance="gshard" if p["is_gshard_loss"] else "load_importance",
        **({"projection": len(tensors["w.gates.0.sim_matrix"])} if p["gate"] == "cosine" else {}),
    )
    layer = load_layer(spec, tensors, p["activation"], p["drop_p"]).train(p["training"])
    x = leaf(tensors["in.x"])
    y, record = layer.forward_with_record(x, tensors.get("in.noise"), tensors.get("in.drop_mask"))
    ((y * tensors["in.cotangent"]).sum() + p["aux_weight"] * record.balance).backward()
    routing = record.routing
    return {
        "out.y": y,
        "out.l_aux": record.balance,
        "out.indices": routing.experts_NK.t(),
        "out.locations": routing.seats_NK.t(),
        "out.gates": routing.gates_NK.t(),
        "out.capacity": routing.capacity,
        "out.grad.x": grad(x),
        **layer_gradients(layer, tensors),
    }
