"""ViT in stages and V-MoE: partial passes, stitches, experts, names, errors."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.errors import CheckpointError, SpecError
from moe.keymaps.m2mkd import check_weights, from_official, official_names, to_official
from moe.layers.layer import collect_balance
from moe.models.vit_specs import ViTSpec, VMoESpec, named_vit, named_vmoe, student_specs
from moe.models.vit_stages import ViTStages, resize_positions
from moe.models.vmoe import VMoE, build_vit, upcycle_mlps
from moe.router_spec import RouterSpec

TINY = {"image_size": 8, "patch_size": 4, "dim": 8, "heads": 2, "mlp_ratio": 2.0, "num_classes": 5}


def vmoe(**changes):
    torch.manual_seed(0)
    fields = {**TINY, "depths": (1, 2), "moe_blocks": (0, 2), "num_experts": 3, "expert_init": "linear", **changes}
    return VMoE(VMoESpec(**fields))


def images(count=3, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(depths=st.lists(st.integers(1, 3), min_size=1, max_size=4), cut=st.integers(0, 100))
def test_any_cut_gives_the_whole_forward(depths, cut):
    torch.manual_seed(0)
    model = ViTStages(ViTSpec(**TINY, depths=tuple(depths)))
    at = 1 + cut % max(1, model.depth - 1)
    x = images()
    whole = model(x)
    parts = model(model(x, 0, at), at) if at < model.depth else whole
    assert torch.equal(whole, parts)
    assert torch.equal(whole, model.classify(run_spans(model, model.embed(x))))


def run_spans(model, tokens):
    for block in model.blocks:
        tokens = block(tokens)
    return tokens


def test_it_is_timms_vision_transformer():
    from timm.models.vision_transformer import VisionTransformer

    model = ViTStages(ViTSpec(**TINY, depths=(2, 1)))
    theirs = VisionTransformer(8, 4, 3, 5, embed_dim=8, depth=3, num_heads=2, mlp_ratio=2.0)
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), theirs(images()))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(images(), 2, 2), r"\[2, 2\)"),
        (lambda m: m(images(), 0, 9), "3 blocks"),
        (lambda m: m(torch.zeros(1, 3, 12, 12)), r"\(1, 3, 12, 12\)"),
        (lambda m: m(images(), 1), "Tokens have shape"),
    ],
)
def test_wrong_inputs_are_named(call, words):
    with pytest.raises(SpecError, match=words):
        call(ViTStages(ViTSpec(**TINY, depths=(2, 1))))


def test_parts_own_what_they_should():
    spec = ViTSpec(**TINY, depths=(1, 2, 1))
    keys = [set(ViTStages(spec.stage(i)).state_dict()) for i in (0, 1, -1)]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= keys[0] and "norm.weight" not in keys[0]
    assert all(key.startswith("blocks.") for key in keys[1])
    assert {"norm.weight", "head.bias"} <= keys[2] and "cls_token" not in keys[2]
    with pytest.raises(SpecError, match="middle part"):
        spec.stage(1).stage(0)
    with pytest.raises(SpecError, match="position 3"):
        spec.stage(3)
    with pytest.raises(SpecError, match=r"\[B, T, 8\]"):
        ViTStages(spec.stage(1))(torch.zeros(2, 5, 6))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"patch_size": 3}, "does not divide image_size"),
        ({"heads": 3}, "does not divide dim"),
        ({"depths": (1, 0)}, "empty stage"),
        ({"moe_blocks": (3,)}, "0 to 2"),
        ({"moe_blocks": (1, 1)}, "different block numbers"),
        ({"num_experts": 1}, "top_k=2 is more than num_experts=1"),
        ({"pre_stitch": (1,)}, "need stitch_dim"),
        ({"pre_stitch": (1,), "stitch_dim": 6}, "takes tokens of width 6 and gets 8"),
        ({"post_stitch": (2,), "stitch_dim": 6}, "the head takes 8"),
        ({"post_stitch": (0,), "stitch_dim": 6}, "takes tokens of width 8 and gets 6"),
        ({"balance_weight": 0.1}, "router.balance is none"),
    ],
)
def test_contradictions_are_refused(fields, words):
    base = {**TINY, "depths": (1, 2), "moe_blocks": (0,), "num_experts": 3}
    with pytest.raises(ValidationError, match=words):
        VMoESpec(**{**base, **fields})


def test_named_models_have_the_published_sizes():
    with torch.device("meta"):
        whole = build_vit(named_vmoe("vmoe_base"))
        students = [build_vit(spec) for spec in student_specs(named_vmoe("vmoe_base"), 1024)]
        huge = build_vit(named_vit("vit_huge_patch14_224").stage(0))
    assert round(count(whole) / 1e6) == 483 and round(count(students[1]) / 1e6) == 122
    assert huge.blocks[0].attn.qkv.bias is None and huge.blocks[0].norm1.eps == 1e-5
    assert named_vit("vit_large_patch16_224", depths=(6, 6, 6, 6)).depth == 24
    for name in (named_vit, named_vmoe):
        with pytest.raises(SpecError, match="Did you mean"):
            name("vmoe_bas" if name is named_vmoe else "vit_bas_patch16_224")


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_students_chain_through_stitches_of_another_width():
    model = VMoESpec(**TINY, depths=(1, 2, 1), moe_blocks=(1, 2), num_experts=2)
    specs = student_specs(model, 6)
    assert [spec.part for spec in specs] == ["first", "middle", "last"]
    assert [spec.moe_blocks for spec in specs] == [(), (0, 1), ()]
    assert [(spec.pre_stitch, spec.post_stitch) for spec in specs] == [((), (0,)), ((0,), (1,)), ((0,), ())]
    x = images()
    for spec, shape in zip(specs, [(3, 5, 6), (3, 5, 6), (3, 5)], strict=True):
        x = VMoE(spec)(x)
        assert tuple(x.shape) == shape
    assert student_specs(VMoESpec(**TINY, depths=(2,)), 6)[0].part == "whole"


def test_a_row_does_not_depend_on_its_neighbours():
    model = vmoe().train()
    x = images(4)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))
    torch.testing.assert_close(model(x.flip(0)).flip(0), model(x))


def test_official_experts_start_almost_as_zero_maps():
    official, linear = vmoe(expert_init="official"), vmoe(expert_init="linear")
    layers = official.moe_layers()
    assert list(layers) == [0, 2] and layers[0].experts.w1.abs().max() <= 1 / (8 * 16) ** 0.5
    assert linear.moe_layers()[0].experts.w1.abs().max() > 1 / (8 * 16) ** 0.5
    assert not layers[0].gate.bias.any() and not layers[0].experts.b1.any()


def test_other_gates_bring_a_balance_loss():
    router = RouterSpec(gate="gshard", top_k=2, balance="gshard", capacity_factor=1.2)
    model = vmoe(router=router, balance_weight=0.01)
    model(images())
    balance = collect_balance(model)
    assert len(balance) == 2 and all(value > 0 and value.requires_grad for value in balance)


def test_second_derivatives_copies_pickles_and_functional_calls():
    model, x = vmoe(), images()
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in first]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    assert not torch.allclose(functional_call(model, doubled, (x,)), expected)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.slow
def test_compilation_keeps_the_numbers():
    model, x = vmoe(), images()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_upcycled_experts_are_the_dense_network():
    torch.manual_seed(0)
    dense = ViTStages(ViTSpec(**TINY, depths=(1, 2)))
    model = vmoe()
    state = upcycle_mlps(dense.state_dict(), model.spec, torch.Generator().manual_seed(1))
    model.load_state_dict(state)
    torch.testing.assert_close(model(images()), dense(images()))
    narrow = ViTStages(ViTSpec(**{**TINY, "mlp_ratio": 1.0}, depths=(1, 2))).state_dict()
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.fc1.weight is \(8, 8\)"):
        upcycle_mlps(narrow, model.spec)


@pytest.mark.parametrize("old, new", [(7, 12), (4, 4), (5, 2), (1, 3)])
def test_positions_are_resized(old, new):
    given = torch.randn(1, 1 + old * old, 3)
    resized = resize_positions(given, new)
    assert resized.shape == (1, 1 + new * new, 3) and torch.equal(resized[:, 0], given[:, 0])
    if old == new:
        assert torch.equal(resized, given)


@pytest.mark.parametrize("shape", [(1, 6, 3), (1, 1, 3), (5, 3)])
def test_positions_that_are_no_grid_are_refused(shape):
    with pytest.raises(CheckpointError, match="cannot be resized"):
        resize_positions(torch.zeros(shape), 4)


def test_official_names_round_trip():
    model = vmoe(pre_stitch=(1,), post_stitch=(0,), stitch_dim=6)
    own = model.state_dict()
    official = to_official(own, (1, 2))
    assert official["blocks.0.moe.experts.1.htoh4.weight"].shape == (1, 16, 8)
    assert official["stages.1.blocks.1.moe.gate.gate.bias"].shape == (3,)
    for kept in (official, plain(official), staged(official)):
        back = from_official(kept)
        assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    fused = {name: value for name, value in plain(official).items() if ".experts." not in name}
    for name, part in (("htoh4.weight", "w1"), ("htoh4.bias", "b1"), ("h4toh.weight", "w2"), ("h4toh.bias", "b2")):
        fused |= {f"blocks.{i}.moe.experts.{name}": own[f"blocks.{i}.mlp.experts.{part}"] for i in (0, 2)}
    back = from_official(fused)
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    assert official_names("blocks.0.mlp.experts.b2", 2) == [f"blocks.0.moe.experts.{e}.h4toh.bias" for e in (0, 1)]
    assert official_names("norm.weight", 8) == ["norm.weight"]


def plain(state):
    return {name: value for name, value in state.items() if not name.startswith("stages.")}


def staged(state):
    return {name: value for name, value in state.items() if name.startswith("stages.")}


def test_damaged_official_files_are_named():
    official = to_official(vmoe().state_dict(), (1, 2))
    with pytest.raises(CheckpointError, match=r"copies of head\.bias"):
        from_official({**official, "head.bias": official["head.bias"] + 1})
    missing = {name: v for name, v in plain(official).items() if "experts.1.htoh4.weight" not in name}
    with pytest.raises(CheckpointError, match=r"experts \[0, 2\]"):
        from_official(missing)
    with pytest.raises(CheckpointError, match="shapes"):
        from_official({**plain(official), "blocks.0.moe.experts.1.htoh4.weight": torch.zeros(1, 4, 4)})
    with pytest.raises(CheckpointError, match="htoh5"):
        from_official({"blocks.0.moe.experts.1.htoh5.weight": torch.zeros(1, 4, 4)})
    with pytest.raises(CheckpointError, match="without gaps"):
        from_official({name: v for name, v in official.items() if not name.startswith("stages.0.")})


def test_weights_are_checked_by_name_and_shape():
    spec = ViTSpec(**TINY, depths=(2,))
    state = build_vit(spec).state_dict()
    check_weights(state, spec, "It")
    broken = {**state, "blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"].T, "odd": torch.zeros(1)}
    del broken["norm.bias"]
    broken["head.weight"] = broken["head.weight"][:3]
    with pytest.raises(CheckpointError) as caught:
        check_weights(broken, spec, "It")
    for words in ("norm.bias is missing", "odd is unexpected", "(8, 16) instead of (16, 8) (transposed)", "(3, 8)"):
        assert words in str(caught.value)
