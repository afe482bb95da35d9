"""Parameters, operations and latency of a model, counted on single images."""

from __future__ import annotations

import torch
from torch import nn

from moe.backbones import build_student
from moe.layers.layer import MoELayer
from moe.layers.router import RouterSpec
from moe.specs import BackboneSpec, StudentMoESpec
from workers.evaluation_cost import latency_ms, model_cost

CPU = torch.device("cpu")


def passes(model, inputs):
    return [lambda x=x: model(x) for x in inputs]


def test_a_linear_layer_counts_a_multiplication_and_an_addition():
    model = nn.Linear(20, 30)
    found = model_cost(model, passes(model, torch.randn(4, 1, 20)))
    assert (found.parameters, found.active_parameters, found.flops) == (630, 630, 2 * 20 * 30)


def test_only_the_experts_that_are_used_count():
    spec = BackboneSpec(name="tiny_cnn")
    images = torch.randn(6, 1, 3, 32, 32)
    dense = build_student(spec, 10).eval()
    base = model_cost(dense, passes(dense, images))
    found = {}
    for experts, top_k in ((4, 1), (8, 1), (8, 2)):
        sparse = build_student(spec, 10, moe=StudentMoESpec(num_experts=experts, top_k=top_k)).eval()
        found[experts, top_k] = model_cost(sparse, passes(sparse, images))
    one = sum(value.numel() for value in sparse.moe.experts[0].parameters())
    assert base.active_parameters == base.parameters
    for (experts, top_k), cost in found.items():
        assert cost.parameters - cost.active_parameters == (experts - top_k) * one
    # Twice the experts cost a wider gate and nothing else; a second choice costs a second expert.
    assert found[8, 1].flops - found[4, 1].flops == 2 * 4 * sparse.feature_dim
    hidden = sparse.moe.experts[0].w1.out_features
    assert found[8, 2].flops - found[8, 1].flops == 2 * 2 * hidden * sparse.feature_dim


def test_the_count_does_not_depend_on_the_kernel():
    torch.manual_seed(0)
    inputs = torch.randn(5, 1, 12, 32)
    costs = []
    for kernel in ("auto", "loop"):
        torch.manual_seed(1)
        layer = MoELayer(32, 64, RouterSpec(top_k=2), 4, kernel=kernel).eval()
        costs.append(model_cost(layer, passes(layer, inputs)))
    assert costs[0] == costs[1] and costs[0].flops > 12 * 2 * 4 * 32 * 64


def test_latency_is_positive_and_of_one_pass():
    model = nn.Linear(4, 4)
    assert 0 < latency_ms(passes(model, torch.randn(3, 1, 4)), CPU) < 1000


def test_queries_that_enter_a_layer_directly_can_be_counted():
    slots = {"core_experts": 2, "univ_experts": 3, "slot_layernorm": True}  # a LayerNorm on a view of a parameter
    vit = {"image_size": 28, "patch_size": 14, "dim": 24, "depth": 2, "num_heads": 2, "moe": slots, "moe_layers": [1]}
    model = build_student(BackboneSpec(name="jetvit", image_size=28, jetvit=vit), 10).eval()

    @torch.inference_mode()
    def forward():
        return model(torch.ones(1, 3, 28, 28))

    assert model_cost(model, [forward]).flops > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
