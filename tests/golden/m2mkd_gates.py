"""Adapters of m2mKD's gates (fastmoe's naive, noisy, GShard and Switch) and of its mixture layer."""

from __future__ import annotations

from typing import Any

import torch

from moe.layers.gates import LinearGate, NoisyGate
from moe.layers.layer import MoELayer
from moe.layers.router import Routing, route_tokens
from moe.router_spec import RouterSpec
from tests.golden.gmoe_routing import grad, leaf
from tests.golden.registry import op

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def load_gate(tensors: Tensors) -> LinearGate:
    """The linear gate with a bias that three of the four share."""
    experts, dim = tensors["w.gate.weight"].shape
    gate = LinearGate(dim, experts, bias=True)
    gate.load_state_dict({"weight": tensors["w.gate.weight"], "bias": tensors["w.gate.bias"]})
    return gate


def gradients(gate: torch.nn.Module, x: torch.Tensor, prefix: str = "") -> Tensors:
    """Gradients of the gate's parameters and of its input."""
    parameters = {f"out.grad.{prefix}{name}": grad(p) for name, p in gate.named_parameters()}
    return {"out.grad.x": grad(x), **parameters}


def pruned(routing: Routing) -> torch.Tensor:
    """Chosen experts, -1 where the choice was dropped."""
    return routing.experts_NK.masked_fill(~routing.kept_NK, -1)


@op("m2mkd.gate_naive")
def gate_naive(case: Case, tensors: Tensors) -> Tensors:
    gate, x = load_gate(tensors), leaf(tensors["in.x"])
    spec = RouterSpec(gate="naive", top_k=case["params"]["top_k"])
    routing, _ = route_tokens(gate(x), spec, training=True)
    index, order = routing.experts_NK.sort(dim=1)
    score = routing.weights_NK.gather(1, order)
    score.backward(tensors["in.cotangent"])
    return {"out.index_sorted": index, "out.score_by_sorted_index": score, **gradients(gate, x, "gate.")}


@op("m2mkd.gate_noisy")
def gate_noisy(case: Case, tensors: Tensors) -> Tensors:
    p, x = case["params"], leaf(tensors["in.x"])
    dim, experts = tensors["w.w_gate"].shape
    gate = NoisyGate(dim, experts, p["noise_epsilon"])
    gate.load_state_dict({name: tensors[f"w.{name}"] for name in ("w_gate", "w_noise")})
    spec = RouterSpec(gate="noisy", top_k=p["top_k"], balance="noisy", noise_epsilon=p["noise_epsilon"])
    routing, _ = route_tokens(
        gate(x), spec, training=p["training"], noise=tensors["in.noise.normal"], deviation_NE=gate.deviation(x)
    )
    routing.balance.backward()
    return {
        "out.index": routing.experts_NK,
        "out.score": routing.weights_NK,
        "out.loss": routing.balance,
        **gradients(gate, x),
    }


def capped(case: Case, tensors: Tensors, spec: RouterSpec, noise: torch.Tensor | None) -> Tensors:
    """Outputs of a gate with capacity: pruned choices, scores that pruning leaves alone, loss."""
    gate, x = load_gate(tensors), leaf(tensors["in.x"])
    routing, _ = route_tokens(gate(x), spec, training=case["params"]["training"], noise=noise)
    routing.balance.backward()
    return {
        "out.index": pruned(routing),
        "out.score": routing.gates_NK,
        "out.loss": routing.balance,
        **gradients(gate, x, "gate."),
    }


@op("m2mkd.gate_gshard")
def gate_gshard(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    spec = RouterSpec(
        gate="gshard",
        top_k=p["top_k"],
        capacity_factor=p["capacity"][0],
        eval_capacity=True,
        eval_capacity_factor=p["capacity"][1],
        random_routing=p["random_routing"],
        balance="gshard",
    )
    return capped(case, tensors, spec, tensors.get("in.noise.random_routing"))


@op("m2mkd.gate_switch")
def gate_switch(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    spec = RouterSpec(
        gate="switch",
        capacity_factor=p["capacity"][0],
        eval_capacity=True,
        eval_capacity_factor=p["capacity"][1],
        switch_eps=p["switch_eps"],
        balance="switch",
    )
    return capped(case, tensors, spec, tensors.get("in.noise.uniform"))


LINEARS = {"htoh4.weight": "w1", "htoh4.bias": "b1", "h4toh.weight": "w2", "h4toh.bias": "b2"}


@op("m2mkd.moe_mlp")
def moe_mlp(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    experts = p["num_expert"]
    spec = RouterSpec(gate="naive", top_k=p["top_k"])
    layer = MoELayer(p["d_model"], p["d_hidden"], spec, experts, activation=p["activation"])
    state = {f"gate.{name}": tensors[f"w.gate.gate.{name}"] for name in ("weight", "bias")}
    for theirs, ours in LINEARS.items():
        state[f"experts.{ours}"] = torch.cat([tensors[f"w.experts.{e}.{theirs}"] for e in range(experts)])
    layer.load_state_dict(state)
    x = leaf(tensors["in.x"])
    y = layer(x)
    y.backward(tensors["in.cotangent"])
    outputs = {"out.y": y, "out.grad.x": grad(x)}
    for name in ("weight", "bias"):
        outputs[f"out.grad.gate.gate.{name}"] = grad(layer.get_parameter(f"gate.{name}"))
    for theirs, ours in LINEARS.items():
        for e, value in enumerate(grad(layer.get_parameter(f"experts.{ours}")).split(1)):
            outputs[f"out.grad.experts.{e}.{theirs}"] = value
    return outputs
