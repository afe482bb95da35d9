"""ConvNeXts cut into smaller ones with slots: every number is one of the predecessor's, at the place it must have."""

from __future__ import annotations

import pytest
import timm
import torch
from pydantic import ValidationError

from moe.conversion.recycle.convnext import (
    CONVNEXT_BLOCKS,
    CONVNEXT_PLACES,
    convnext_lists,
    cut_convnext,
    read_convnext,
)
from moe.conversion.recycle.options import RecycleOptions, StatisticsOptions
from moe.conversion.recycle.probe import collect_statistics
from moe.errors import CheckpointError
from moe.jet_specs import JetConvNeXtSpec, c_jetmoe, jet_spec
from moe.jetpack_specs import JetViTSpec
from moe.models.convnext import build_c_jetmoe, build_jet_convnext

SPEC = JetConvNeXtSpec(
    image_size=64,
    dims=(12, 16, 24, 32),
    depths=(1, 1, 2, 1),
    moe={"core_experts": 2, "univ_experts": 4, "slot_layernorm": True},
    moe_layers=(2, 3, 4),
    stage_experts=(None, None, None, (1, 2)),
)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = timm.models.ConvNeXt(dims=(24, 32, 48, 64), depths=(1, 2, 4, 2), num_classes=5).eval()
    for value in model.parameters():
        if value.ndim == 1:
            value.data.add_(0.1 * torch.randn_like(value))  # no two channels alike
    return model


@pytest.fixture(scope="module")
def statistics(teacher):
    images = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    options = StatisticsOptions(metrics=("L1", "L2", "act_patrn", "co_act"))
    made = collect_statistics(teacher, images, options, places=CONVNEXT_PLACES, blocks=CONVNEXT_BLOCKS).finalise()
    assert sorted(made.of("norm2", "L2")) == list(range(9))  # blocks of all stages, in order
    assert [len(made.of("mlp_act", "L2")[block]) for block in (0, 1, 3, 8)] == [96, 128, 192, 256]
    return made


def recycled(teacher, options, statistics=None, spec=SPEC, donor=None):
    source, fresh = teacher.state_dict(), build_jet_convnext(spec, 3).state_dict()
    generator = torch.Generator().manual_seed(0)
    lists = convnext_lists(source, fresh, options, generator=generator, statistics=statistics)
    return lists, fresh, *cut_convnext(source, fresh, lists, donor=donor, inherit_norms=options.inherit_norms)


@pytest.mark.parametrize("select", ["L1", "L2", "act_patrn", "random", "uniform", "co_act"])
def test_every_selection_cuts_consistent_units(select, teacher, statistics):
    graph = {"graph": {"method": "louvain"}} if select == "co_act" else {}
    lists, fresh, state, origin = recycled(teacher, RecycleOptions(select=select, **graph), statistics)
    source = teacher.state_dict()
    assert list(state) == list(fresh)
    build_jet_convnext(SPEC, 3).load_state_dict(state)
    # Depthwise kernels of stage 2 follow its stream, the patch map before it both streams.
    before, stream = lists[1].dense.channel[0], lists[2].dense.channel[0]
    name = "stages.2.downsample.1.weight"
    assert torch.equal(state[name], source[name][stream][:, before])
    name = "stages.2.blocks.1.conv_dw.weight"
    assert torch.equal(state[name], source[name][stream])
    # An expert: its own channels and neurons; a universal one keeps every fourth neuron.
    channel, neuron = lists[2].experts.channel[1], lists[2].experts.neuron[1]
    fc1, fc2 = source["stages.2.blocks.1.mlp.fc1.weight"], source["stages.2.blocks.1.mlp.fc2.weight"]
    core = state["stages.2.blocks.1.mlp.core_experts.vit_fc1.weight"]
    assert torch.equal(core[1], fc1[neuron[1]][:, channel[1]])
    univ = state["stages.2.blocks.1.mlp.univ_experts.vit_fc2.weight"]
    thin = torch.linspace(0, neuron.shape[1] - 1, univ.shape[2]).round().long()
    assert torch.equal(univ[3], fc2[channel[5]][:, neuron[5][thin]])
    fresh_names = {name for name, where in origin.items() if where == "fresh"}
    assert all(n.startswith("head.fc") or ".mlp." in n for n in fresh_names)
    assert not any("experts" in n or "fc1" in n for n in fresh_names)


def test_shared_channels_norms_and_depth(teacher, statistics):
    options = RecycleOptions(channels="shared_topk", inherit_norms=True, depth="even")
    lists, _, state, _ = recycled(teacher, options, statistics)
    assert lists[2].layers == (0, 3) and lists[1].layers == (0,)
    experts = lists[2].experts.channel[0]
    assert torch.equal(experts, lists[2].dense.channel[0].expand_as(experts))
    assert torch.equal(
        state["stages.2.blocks.1.mlp.slot_norm.weight"],
        teacher.state_dict()["stages.2.blocks.3.norm.weight"][lists[2].dense.channel[1]],
    )


def test_the_dense_counterpart_has_the_same_stream(teacher):
    lists, _, state, _ = recycled(teacher, RecycleOptions(select="random"))
    dense = build_jet_convnext(SPEC.model_copy(update={"moe": None, "moe_layers": (), "stage_experts": ()}), 3)
    made, _ = cut_convnext(teacher.state_dict(), dense.state_dict(), lists)
    dense.load_state_dict(made)
    shared = [name for name in made if name in state and not name.startswith("head.fc")]
    assert len(shared) > 40 and all(torch.equal(made[name], state[name]) for name in shared)


def test_a_whole_copy_computes_what_the_predecessor_computes(teacher):
    same = JetConvNeXtSpec(image_size=64, dims=(24, 32, 48, 64), depths=(1, 2, 4, 2))
    fresh = build_jet_convnext(same, 5)
    options = RecycleOptions(select="copy")
    lists = convnext_lists(
        teacher.state_dict(), fresh.state_dict(), options, generator=torch.Generator().manual_seed(0)
    )
    fresh.load_state_dict(cut_convnext(teacher.state_dict(), fresh.state_dict(), lists)[0])
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        fresh.eval().forward_head(fresh.forward_features(images), pre_logits=True),
        teacher.forward_head(teacher.forward_features(images), pre_logits=True),
    )


def test_a_donor_gives_all_but_the_experts(teacher):
    donor = build_jet_convnext(SPEC.model_copy(update={"moe": None, "moe_layers": (), "stage_experts": ()}), 9)
    *_, state, origin = recycled(teacher, RecycleOptions(select="uniform"), donor=donor.state_dict())
    assert {where for name, where in origin.items() if "experts" in name} == {"predecessor"}
    for name, where in origin.items():
        if where == "donor":
            assert torch.equal(state[name], donor.state_dict()[name])
    assert origin["stem.0.weight"] == "donor" and origin["head.fc.weight"] == "fresh"
    wrong = build_jet_convnext(JetConvNeXtSpec(image_size=64, dims=(8, 16, 24, 32), depths=(1, 1, 2, 1)), 9)
    with pytest.raises(CheckpointError, match=r"stem.0.weight of the donor has shape \(8"):
        recycled(teacher, RecycleOptions(select="uniform"), donor=wrong.state_dict())


def test_checkpoints_that_do_not_fit_are_named(teacher):
    state = dict(teacher.state_dict())
    with pytest.raises(CheckpointError, match="no ConvNeXt"):
        read_convnext(timm.create_model("test_vit").state_dict(), "predecessor")
    with pytest.raises(CheckpointError, match="channels first"):
        read_convnext(timm.create_model("convnext_atto").state_dict(), "predecessor")
    with pytest.raises(CheckpointError, match=r"lacks stages.1.blocks.1.norm.bias"):
        read_convnext({n: v for n, v in state.items() if n != "stages.1.blocks.1.norm.bias"}, "predecessor")
    with pytest.raises(CheckpointError, match="unknown tensors extra"):
        read_convnext({**state, "extra": torch.zeros(1)}, "predecessor")
    name = "stages.2.blocks.0.mlp.fc2.weight"
    with pytest.raises(CheckpointError, match="transposed"):
        read_convnext({**state, name: state[name].T}, "predecessor")
    for change, words in (({"dims": (12, 16, 24, 80)}, "Stage 3 .* larger"), ({"depths": (1, 1, 5, 1)}, "5 blocks")):
        changed = JetConvNeXtSpec(**{**SPEC.model_dump(), "moe": None, "moe_layers": (), "stage_experts": (), **change})
        with pytest.raises(CheckpointError, match=words):
            recycled(teacher, RecycleOptions(select="random"), spec=changed)


def test_the_papers_network():
    spec = c_jetmoe()
    assert spec.stage_experts == (None, None, (98, 196), (24, 48)) and spec.moe_layers == tuple(range(9, 18))
    with torch.device("meta"):
        ours, theirs = build_jet_convnext(spec, 1000), build_c_jetmoe(1000)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    for block in (9, 17):
        own = spec.layer_spec(block)
        assert own.noise_mult == 1 / (294 if block < 15 else 72)
        assert own.drop_path == pytest.approx(0.1 * block / 17)


def test_records_are_told_apart_and_checked():
    assert jet_spec(SPEC.model_dump(mode="json")) == SPEC
    vit = JetViTSpec(image_size=32)
    assert jet_spec(vit.model_dump(mode="json")) == vit
    for change, words in (
        ({"depths": (1, 1)}, "stages"),
        ({"image_size": 40}, "multiple of 32"),
        ({"moe_layers": (9,)}, "do not exist"),
        ({"moe": None}, "moe is not given"),
        ({"stage_experts": ((1, 1),)}, "no block"),
        ({"stage_experts": (None, None, (0, 0))}, "without experts"),
    ):
        with pytest.raises(ValidationError, match=words):
            JetConvNeXtSpec(**{**SPEC.model_dump(), **change})
