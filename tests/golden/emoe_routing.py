"""Adapters of EMoE's gates, routing, auxiliary losses, layer and gate update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moe.layers.balance import gshard_loss
from moe.layers.dispatch import combine, dispatch
from moe.layers.gates import CosineGate, LinearGate, updated_gate
from moe.layers.router import route_scores, route_tokens
from moe.layers.seating import count_choices
from moe.router_spec import RouterSpec
from tests.golden.gmoe_routing import grad, layer_gradients, leaf, load_layer, slot_rows, stored_routing, transposed
from tests.golden.registry import check, op
from tests.golden.replay import compare

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

GATES = {"top": "linear", "cosine_top": "cosine"}


def gate_outputs(gate: torch.nn.Module, tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Logits and gradients of a gate whose parameters have official names."""
    gate.load_state_dict({ours: tensors[f"w.{theirs}"] for theirs, ours in names.items()})
    x = leaf(tensors["in.x"])
    logits = gate(x)
    logits.backward(tensors["in.grad_y"])
    gradients = {f"out.grad.{theirs}": grad(gate.get_parameter(ours)) for theirs, ours in names.items()}
    return {"out.logits": logits, "out.grad.x": x.grad, **gradients}


@op("emoe.gate_linear")
def gate_linear(case: Case, tensors: Tensors) -> Tensors:
    experts, dim = tensors["w.wg"].shape
    gate = LinearGate(dim, experts, normalize_input=case["params"]["normalize"])
    return gate_outputs(gate, tensors, {"wg": "weight"})


@op("emoe.gate_cosine")
def gate_cosine(case: Case, tensors: Tensors) -> Tensors:
    projection, dim = tensors["w.projector.weight"].shape
    gate = CosineGate(dim, tensors["w.sim_matrix"].shape[1], projection)
    return gate_outputs(gate, tensors, {name: name for name in gate.state_dict()})


@op("emoe.routing")
def routing(case: Case, tensors: Tensors) -> Tensors:
    p, scores = case["params"], tensors["in.scores"]
    spec = RouterSpec(**{"normalize_gates" if name == "normalize_gate" else name: p[name] for name in p})
    found = route_scores(scores, spec, spec.capacity_factor)
    return {
        "out.indices": found.experts_NK.t(),
        "out.gates": found.gates_NK.t(),
        "out.locations": found.seats_NK.t(),
        "out.kept": found.kept_NK.t().long(),
        "out.capacity": found.capacity.view(1),
        "out.counts": count_choices(found.experts_NK, scores.shape[1]),
        "out.kept_counts": found.counts_E,
        "out.gshard_loss": gshard_loss(scores, found.experts_NK).view(1),
    }


@check("emoe.routing")
def check_routing(case: Case, tensors: Tensors, outputs: Tensors) -> Iterable[str]:
    """A case with tied importance stores only what does not depend on how ties are broken."""
    yield from compare(case, tensors, {name: value for name, value in outputs.items() if name in tensors})


@op("emoe.dispatch_combine")
def dispatch_combine(case: Case, tensors: Tensors) -> Tensors:
    capacity = case["params"]["capacity"]
    x, gates, expert_out = (leaf(tensors[f"in.{name}"]) for name in ("x", "gates", "expert_out"))
    found = stored_routing(tensors, gates, capacity, len(expert_out))
    sent = dispatch(x, found)
    rows = slot_rows(sent, found, capacity)
    dispatched = x.new_zeros(expert_out.shape).flatten(0, 1).index_copy(0, rows, sent.tokens_MD).view_as(expert_out)
    y = combine(expert_out.flatten(0, 1).index_select(0, rows), sent, found.weights_NK)
    ((dispatched * tensors["in.grad_dispatched"]).sum() + (y * tensors["in.grad_y"]).sum()).backward()
    return {
        "out.dispatched": dispatched,
        "out.y": y,
        "out.grad.x": grad(x),
        "out.grad.gates": grad(gates),
        "out.grad.expert_out": grad(expert_out),
    }


@op("emoe.aux_loss")
def aux_loss(case: Case, tensors: Tensors) -> Tensors:
    p, logits = case["params"], leaf(tensors["in.logits"])
    spec = RouterSpec(top_k=min(p["top_k"], logits.shape[1]), noise=p["gate_noise"], balance=p["kind"])
    found, _ = route_tokens(logits, spec, training=p["noisy"], noise=tensors.get("in.noise"))
    found.balance.backward()
    return {
        "out.loss": found.balance.view(1),
        "out.topk_indices": found.experts_NK,
        "out.grad.logits": grad(logits),
    }


@op("emoe.moe_layer")
def moe_layer(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    spec = RouterSpec(
        gate=GATES[p["gate"]],
        top_k=min(p["top_k"], p["num_experts"]),
        capacity_factor=p["capacity_factor"],
        eval_capacity=True,
        batch_prioritized=p["batch_prioritized"],
        one_score=p["one_score"],
        noise=p["gate_noise"],
        balance="load_importance",
        normalize_input=p["normalize_gate_input"] and p["gate"] == "top",
        **({"projection": len(tensors["w.gates.0.sim_matrix"])} if p["gate"] == "cosine_top" else {}),
    )
    layer = load_layer(spec, tensors, p["activation"]).train(p["training"])
    x = leaf(tensors["in.x"])
    y, record = layer.forward_with_record(x, tensors.get("in.noise"))
    ((y * tensors["in.grad_y"]).sum() + p["aux_weight"] * record.balance).backward()
    outputs = {
        "out.y": y,
        "out.l_aux": record.balance.view(1),
        "out.routing_counts": count_choices(record.routing.experts_NK, p["num_experts"]),
        "out.grad.x": grad(x),
        **layer_gradients(layer, tensors),
    }
    if "w.dense.b2" in tensors:
        outputs["out.y_dense"] = dense(layer, x, tensors["w.dense.b2"])
    return outputs


def dense(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The feed-forward network of all experts' neurons: one expert of the project that is E times as wide."""
    from moe.layers.kernels import expert_ffn

    experts = layer.experts
    w1, b1 = experts.w1.flatten(0, 1).unsqueeze(0), experts.b1.flatten().unsqueeze(0)
    w2 = experts.w2.permute(1, 0, 2).flatten(1).unsqueeze(0)
    rows = x.flatten(0, -2)
    return expert_ffn(rows, [len(rows)], w1, b1, w2, bias.unsqueeze(0), experts.activation).view_as(x)


@op("emoe.gate_update")
def gate_update(case: Case, tensors: Tensors) -> Tensors:
    p = case["params"]
    values = transposed("batched_fc2_w", tensors["w.experts.batched_fc2_w"]) if p["value_norm_weighted"] else None
    gate, keys = tensors["w.gates.0.wg.weight"], tensors["w.experts.batched_fc1_w"]
    return {"out.gate": updated_gate(gate, keys, values, momentum=p["momentum"], normalize=p["normalize"])}
