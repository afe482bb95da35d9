"""Sparse upcycling: what is copied, resized, adapted and refused."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.conversion.upcycle import adapt_channels, load_upcycled, resize_positions, upcycle
from moe.errors import CheckpointError
from moe.models.gmoe_spec import GMoESpec
from moe.models.surgery import moe_layers
from moe.models.vit import ViTShape, build_vit, gmoe_vit

SHAPE = {"image_size": 16, "patch_size": 8, "dim": 8, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}


def dense(classes=4, **shape):
    torch.manual_seed(0)
    return build_vit(ViTShape(**{**SHAPE, **shape}), classes).state_dict()


def sparse(classes=4, experts=3, pattern=("F", "S", "F"), **shape):
    torch.manual_seed(1)
    return build_vit(
        ViTShape(**{**SHAPE, **shape}), classes, GMoESpec(pattern=pattern, num_experts=experts, projection=4)
    )


@settings(max_examples=15, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("FS"), min_size=3, max_size=3).filter(lambda k: "S" in k),
    experts=st.integers(1, 5),
    source=st.sampled_from([8, 16, 32]),
    target=st.sampled_from([8, 16, 24]),
    channels=st.integers(1, 6),
    distilled=st.booleans(),
)
def test_every_tensor_comes_from_the_dense_network_or_is_fresh(kinds, experts, source, target, channels, distilled):
    given_state = dense(image_size=source, distilled=distilled)
    vit = sparse(4, experts, tuple(kinds), image_size=target, channels=channels, distilled=distilled)
    fresh = load_upcycled(vit, given_state)
    assert all(".mlp.gate." in name for name in fresh)
    for name, value in vit.state_dict().items():
        if ".experts." in name:
            layer, _, tensor = name.rpartition(".experts.")
            kind, number = {"w": "weight", "b": "bias"}[tensor[0]], tensor[1]
            for copy in value:
                assert torch.equal(copy, given_state[f"{layer}.fc{number}.{kind}"])
        elif name not in fresh and name not in ("pos_embed", "patch_embed.proj.weight"):
            assert torch.equal(value, given_state[name])


def test_experts_are_independent_copies():
    vit = sparse()
    load_upcycled(vit, dense())
    layer = moe_layers(vit)["blocks.1.mlp"]
    with torch.no_grad():
        layer.experts.w1[0].zero_()
    assert bool(layer.experts.w1[1].any())


def test_the_head_is_fresh_unless_class_counts_agree():
    vit = sparse(5)
    before = vit.head.weight.clone()
    assert {"head.weight", "head.bias"} <= set(load_upcycled(vit, dense(4)))
    assert torch.equal(vit.head.weight, before)
    vit = sparse(4)
    assert not {"head.weight", "head.bias"} & set(load_upcycled(vit, dense(4)))
    headless = {n: v for n, v in dense(4).items() if not n.startswith("head.")}
    assert "head.weight" in upcycle(headless, sparse(4)).fresh


def test_a_dense_target_is_a_plain_load():
    torch.manual_seed(2)
    vit = build_vit(ViTShape(**SHAPE), 4)
    assert load_upcycled(vit, dense()) == []
    torch.testing.assert_close(vit.state_dict(), dense())


def test_channels():
    kernel = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(adapt_channels(kernel, 1)[:, 0], kernel.sum(1))
    torch.testing.assert_close(adapt_channels(kernel, 5), kernel[:, [0, 1, 2, 0, 1]] * 0.6)
    torch.testing.assert_close(adapt_channels(kernel, 2), kernel[:, :2] * 1.5)
    assert adapt_channels(kernel, 3) is kernel
    with pytest.raises(CheckpointError, match="2 input channels, the network has 4"):
        adapt_channels(kernel[:, :2], 4)


def test_positions_keep_the_class_token_and_are_bicubic():
    vit = sparse(image_size=40)
    positions = torch.randn(1, 10, 8)
    resized = resize_positions(positions, vit)
    assert torch.equal(resized[:, 0], positions[:, 0])
    grid = positions[:, 1:].reshape(1, 3, 3, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (5, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 25, 8))
    with pytest.raises(CheckpointError, match="11 entries"):
        resize_positions(torch.randn(1, 11, 8), vit)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.weight"), "1 missing: blocks.1.mlp.fc1.weight"),
        (lambda s: s.pop("norm.weight"), "1 missing: norm.weight"),
        (lambda s: s.update({"blocks.3.norm1.weight": torch.ones(8)}), "1 unexpected: blocks.3.norm1.weight"),
        (
            lambda s: s.update({"blocks.1.mlp.fc1.weight": s["blocks.1.mlp.fc1.weight"].t()}),
            r"fc1.weight \(8, 16\) instead of \(16, 8\)",
        ),
        (lambda s: s.update({"blocks.1.mlp.fc2.bias": s["blocks.1.mlp.fc2.bias"][:5]}), r"\(5,\) instead of \(8,\)"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][0]}), r"pos_embed \(5, 8\)"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}), r"\(8, 3, 4, 4\)"),
        (lambda s: s.update({"head.weight": torch.zeros(4, 9)}), r"head.weight \(4, 9\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    state = dense()
    change(state)
    vit = sparse()
    before = {n: v.clone() for n, v in vit.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_upcycled(vit, state)
    assert all(torch.equal(v, before[n]) for n, v in vit.state_dict().items())


def test_another_family_or_a_distilled_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="unexpected"):
        upcycle(timm.create_model("resnet18").state_dict(), sparse())
    with pytest.raises(CheckpointError, match="dist_token"):
        upcycle(dense(distilled=True), sparse())


def test_from_a_timm_name():
    source = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    vit = gmoe_vit("vit_tiny_patch16_224", 4, GMoESpec(num_experts=2, projection=8), image_size=48)
    assert len(load_upcycled(vit, source.state_dict())) == 2 * 4
    assert vit(torch.randn(1, 3, 48, 48)).shape == (1, 4)
