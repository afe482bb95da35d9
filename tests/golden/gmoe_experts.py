"""Adapter of GMoE's expert operation."""

from __future__ import annotations

from typing import Any

import torch

from moe.layers.experts import Experts
from tests.golden.registry import op

NAMES = {"w1": "batched_fc1_w", "b1": "batched_fc1_bias", "w2": "batched_fc2_w", "b2": "batched_fc2_bias"}


@op("gmoe.expert_ffn")
def expert_ffn(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    params, x = case["params"], tensors["in.x"].clone().requires_grad_()
    experts = Experts(
        params["num_experts"],
        params["model_dim"],
        params["hidden"],
        activation=params["activation"],
        out_dim=params["output_dim"],
        bias=(params["has_fc1_bias"], params["has_fc2_bias"]),
    )
    # The official second layer is stored (in, out).
    state = {ours: tensors[f"w.{theirs}"] for ours, theirs in NAMES.items() if f"w.{theirs}" in tensors}
    experts.load_state_dict(state | {"w2": state["w2"].transpose(1, 2)})
    y = experts(x.flatten(0, 1), [x.shape[1]] * params["num_experts"]).unflatten(0, x.shape[:2])
    y.backward(tensors["in.cotangent"])
    gradients = {f"out.grad.{NAMES[name]}": parameter.grad for name, parameter in experts.named_parameters()}
    gradients["out.grad.batched_fc2_w"] = gradients["out.grad.batched_fc2_w"].transpose(1, 2)
    return {"out.y": y, "out.grad.x": x.grad, **gradients}
