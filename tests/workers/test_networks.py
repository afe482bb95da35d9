"""What a network's settings ask of a loss."""

from __future__ import annotations

import pytest

from moe.specs import BackboneSpec
from workers.networks import balance_left_out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ""),
        ({"gmoe": {"aux_weight": 0.02}}, "balance loss of experts (gmoe.aux_weight=0.02)"),
        ({"gmoe": {"balance": "none"}}, ""),
        (
            {"emoe": {"num_experts": 4, "top_k": 2}, "emoe_layers": [10]},
            "balance loss of experts (emoe.aux_weight=0.01)",
        ),
        ({"emoe": {"num_experts": 4, "top_k": 2, "gate_noise": 0}, "emoe_layers": [10]}, ""),
    ],
)
def test_balance_losses_that_plain_training_leaves_out(settings, told):
    assert balance_left_out(BackboneSpec(name="timm:vit_tiny_patch16_224", **settings)) == told
