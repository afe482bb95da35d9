"""Checkpoint recycling refuses what does not fit, naming tensor and shapes."""

import torch
from pydantic import ValidationError
from pytest import fixture, mark, param, raises

from moe.conversion.recycle.layout import read_dense
from moe.conversion.recycle.options import RecycleOptions
from moe.conversion.recycle.recycle import recycle, stitch
from moe.conversion.recycle.weights import UnitLists, select_weights
from moe.errors import CheckpointError, DataError, SpecError
from tests.moe.recycle_helpers import dense_state, record, seeded, successor_state

# -- bad input -------------------------------------------------------------------------------------------------------


@fixture
def old():
    return dense_state()


def transpose(state):
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].T


def truncate(state):
    state["blocks.2.attn.qkv.weight"] = state["blocks.2.attn.qkv.weight"][:40]


@mark.parametrize(
    ("spoil", "message"),
    [
        param(
            transpose, r"blocks.1.mlp.fc1.weight .*\(16, 64\) instead of \(64, 16\). It is transposed", id="transposed"
        ),
        param(
            truncate, r"blocks.2.attn.qkv.weight .*\(40, 16\) instead of \(48, 16\). It is truncated", id="truncated"
        ),
        param(
            lambda s: s.pop("blocks.1.mlp.fc2.weight"), "Block 1 of the predecessor lacks mlp.fc2.weight", id="missing"
        ),
        param(lambda s: s.pop("blocks.1.norm1.bias"), r"Block 1 .*differs from block 0 in norm1.bias", id="one bias"),
        param(
            lambda s: s.update({"blocks.0.conv.weight": torch.ones(1)}), "blocks.0.conv.weight", id="unknown in block"
        ),
        param(lambda s: s.update({"stem.weight": torch.ones(1)}), "'stem.weight'", id="unknown"),
        param(lambda s: s.update({"cls_token": torch.ones(1, 1, 3)}), r"cls_token .*\(1, 1, 3\)", id="stem"),
        param(lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1")], r"none of \[1\]", id="block gone"),
        param(
            lambda s: s.clear() or s.update({"layer1.0.conv1.weight": torch.ones(1)}),
            "not a vision transformer",
            id="family",
        ),
    ],
)
def test_spoiled_predecessors_are_told_by_name_and_shape(old, spoil, message):
    spoil(old)
    with raises(CheckpointError, match=message):
        recycle(old, successor_state(), RecycleOptions(select="random"), generator=seeded())
    with raises(CheckpointError, match=message):
        read_dense(old, "predecessor")


@mark.parametrize(
    ("successor", "message"),
    [
        param(successor_state(dim=32), r"width 32, 128 neurons per expert\) is larger .*width 16, 64", id="wider"),
        param(successor_state(hidden=80), "80 neurons per expert", id="more neurons"),
        param(successor_state(depth=5, blocks=(1,)), "5 blocks, the predecessor only 3", id="deeper"),
        param(successor_state(factor=2.0), "univ_experts has 64 neurons per expert, more than the 32", id="universal"),
        param(dense_state(dim=8), "The successor has no experts", id="dense"),
        param(successor_state() | {"moe_layers_dict.a.phi": torch.ones(1)}, "shares expert layers", id="shared"),
        param(
            successor_state() | {"blocks.1.mlp.core_experts.vit_fc2.weight": torch.ones(2, 32, 8)},
            r"core_experts.vit_fc2.weight of the successor has shape \(2, 32, 8\) instead of \(2, 8, 32\)",
            id="expert transposed",
        ),
        param(
            successor_state() | {"blocks.1.mlp.core_experts.eva_fc1_g.weight": torch.ones(2, 32, 8)},
            "eva_fc1_g.weight .*Gated experts need a gated predecessor",
            id="gated",
        ),
        param(
            successor_state() | {"pos_embed": torch.ones(1, 9, 8)}, r"pos_embed has shape \(1, 5, 8\)", id="positions"
        ),
        param(successor_state() | {"extra": torch.ones(2)}, r"extra \(2,\) is not in the predecessor", id="extra"),
    ],
)
def test_successors_that_do_not_fit_are_told(old, successor, message):
    with raises(CheckpointError, match=message):
        recycle(old, successor, RecycleOptions(select="random"), generator=seeded())


def test_options_and_statistics_that_do_not_fit_are_told(old):
    new = successor_state()
    with raises(SpecError, match="'L2' needs activation statistics"):
        recycle(old, new, generator=seeded())
    with raises(SpecError, match="'copy' keeps everything, but the successor has 8 of 16 channel"):
        recycle(old, new, RecycleOptions(select="copy"), generator=seeded())
    with raises(DataError, match=r"layer 0 has shape \(20,\) instead of \(16,\)"):
        recycle(old, new, generator=seeded(), statistics=record(dim=20))
    with raises(CheckpointError, match="donor has width 16, the successor 8"):
        recycle(old, new, RecycleOptions(select="random"), generator=seeded(), donor=old)
    with raises(CheckpointError, match=r"experts.vit of the recycled experts has shape \(2,\)"):
        stitch({"experts.vit": torch.ones(3)}, {}, {"experts.vit": torch.ones(2)})
    with raises(SpecError, match="merge_qkv"):
        lists = UnitLists({}, {}, {})
        select_weights(old, lists, lists, [], merge_qkv=True)
    with raises(ValidationError, match="shared_topk"):
        RecycleOptions(select="random", channels="shared_topk")
    with raises(ValidationError, match="rounding"):
        RecycleOptions(rounding="floor")
