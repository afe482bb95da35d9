"""Vision transformers with sparse blocks: geometry, surgery, one pass, attention maps, key maps, life as a student."""

import copy
import io
import pickle

import pydantic
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.backbones import build_classifier, build_student, classifier_to_student, feature_dim, student_to_classifier
from moe.errors import CheckpointError, RunFailed, SpecError
from moe.inner import inner_step, uniform_rates
from moe.keymaps.gmoe import (
    COUNT,
    erm_from_official,
    erm_to_official,
    from_official,
    load_official,
    merge_ranks,
    to_official,
)
from moe.models.gmoe_spec import GMoESpec
from moe.models.mnist_cnn import MnistCNN
from moe.models.surgery import aux_loss, moe_layers, sparsify
from moe.models.vit import B16, S16, BlockDraws, ViTShape, build_vit, gmoe_vit, run_vit
from moe.specs import BackboneSpec

SHAPE = ViTShape(image_size=16, patch_size=8, dim=16, depth=4, num_heads=2, mlp_ratio=2.0)
SPEC = GMoESpec(pattern="every_two", num_experts=3, projection=8)
SMALL = BackboneSpec(name="timm:vit_tiny_patch16_224", image_size=32, gmoe={"num_experts": 2, "projection": 8})


def tiny(spec=SPEC, seed=0, classes=3, **shape):
    torch.manual_seed(seed)
    return build_vit(ViTShape(**{**SHAPE.__dict__, **shape}), classes, spec)


def images(count=4, seed=1, side=16, dtype=torch.float32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape, classes, count", [(S16, 7, 33_684_233), (B16, 65, 133_469_763)])
def test_number_of_parameters_of_the_published_models(shape, classes, count):
    with torch.device("meta"):
        vit = build_vit(shape, classes, GMoESpec())
    assert sum(p.numel() for p in vit.parameters()) == count
    assert list(moe_layers(vit)) == ["blocks.8.mlp", "blocks.10.mlp"]


def test_a_timm_name_gives_the_same_network():
    with torch.device("meta"):
        named, built = gmoe_vit("deit_small_patch16_224", 7), build_vit(S16, 7, GMoESpec())
    assert {n: p.shape for n, p in named.state_dict().items()} == {n: p.shape for n, p in built.state_dict().items()}
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in named.blocks] == pytest.approx(
        [0.1 * i / 11 for i in range(12)]
    )
    assert named.norm.eps == named.blocks[0].norm1.eps == 1e-6
    assert isinstance(named, VisionTransformer)


def test_patterns():
    assert "".join(GMoESpec().kinds(12)) == "FFFFFFFFSFSF"
    assert "".join(GMoESpec(pattern="every_two").kinds(6)) == "FSFSFS"
    assert "".join(GMoESpec(pattern=["S", "F", "F"]).kinds(3)) == "SFF"
    with pytest.raises(SpecError, match="names 3 blocks, the network has 4"):
        tiny(GMoESpec(pattern=["S", "F", "F"]))
    with pytest.raises(SpecError, match="last_two"):
        GMoESpec().kinds(2)
    with pytest.raises(pydantic.ValidationError, match="no sparse block"):
        GMoESpec(pattern=["F", "F"])
    with pytest.raises(pydantic.ValidationError, match="top_k=7 is more than num_experts=6"):
        GMoESpec(top_k=7)
    with pytest.raises(pydantic.ValidationError, match="noise"):
        GMoESpec(gate_noise=0.0)


@pytest.mark.parametrize(
    "wrong", [{"num_heads": 3}, {"patch_size": 7}, {"depth": 0}, {"mlp_ratio": 0.01}, {"channels": 0}]
)
def test_impossible_geometries_are_refused(wrong):
    with pytest.raises(SpecError, match=next(iter(wrong))):
        ViTShape(**{**SHAPE.__dict__, **wrong})


def test_surgery_refuses_what_it_cannot_do():
    with pytest.raises(SpecError, match="A Linear has no blocks"):
        sparsify(torch.nn.Linear(2, 2), SPEC)
    with pytest.raises(SpecError, match="Block 1 is sparse already"):
        sparsify(tiny(), SPEC)
    swiglu = VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, mlp_layer=timm.layers.SwiGLU)
    with pytest.raises(SpecError, match="block 1 is a SwiGLU"):
        sparsify(swiglu, SPEC)
    with pytest.raises(SpecError, match="timm has no model"):
        gmoe_vit("deit_smal", 3)
    with pytest.raises(SpecError, match="no blocks to make sparse"):
        gmoe_vit("resnet18", 3)


def test_copies_start_as_the_dense_network_up_to_the_gate():
    """With one expert and everything kept the gate's probability is 1, so upcycling keeps the function."""
    dense = tiny(None).eval()
    sparse = copy.deepcopy(dense)
    sparsify(sparse, GMoESpec(pattern="every_two", num_experts=1, capacity_factor=None), experts="copies")
    torch.testing.assert_close(sparse.eval()(images()), dense(images()))
    assert aux_loss(sparse) == 0  # one expert cannot be out of balance
    assert aux_loss(dense) is None


def test_initialisation():
    vit = build_vit(ViTShape(image_size=32, patch_size=4, dim=128, depth=4, num_heads=2), 10, GMoESpec())
    vit.requires_grad_(False)
    layer = vit.blocks[2].mlp
    assert float(layer.gate.projector.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(vit.cls_token.std()) == pytest.approx(0.02, rel=0.3)
    assert float(layer.experts.w1.abs().max()) == pytest.approx(128**-0.5, rel=0.01)
    assert float(vit.blocks[1].mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not layer.gate.projector.bias.any() and not vit.head.bias.any()


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_explicit_pass_equals_timms(distilled, training):
    vit = tiny(distilled=distilled).train(training)
    torch.manual_seed(3)
    plain = vit(images())
    torch.manual_seed(3)
    out = run_vit(vit, images())
    logits = out.logits_BK if out.logits_dist_BK is None else (out.logits_BK + out.logits_dist_BK) / 2
    torch.testing.assert_close(logits, plain)
    assert (out.logits_dist_BK is not None) == (distilled and training)
    torch.testing.assert_close(sum(out.aux.values()), aux_loss(vit))
    assert list(out.records) == [1, 3] and not out.maps
    assert out.features_BD.shape == (4, 16)


def test_attention_maps_on_request_do_not_change_the_numbers():
    vit = tiny().eval()
    plain, some, every = (run_vit(vit, images(), attention_maps=maps) for maps in (False, [0, 3], True))
    assert list(some.maps) == [0, 3] and list(every.maps) == [0, 1, 2, 3]
    torch.testing.assert_close(some.logits_BK, plain.logits_BK)
    torch.testing.assert_close(every.logits_BK, plain.logits_BK)
    for attention in every.maps.values():
        assert attention.shape == (4, 2, 5, 5)
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, 5))


def test_injected_draws_replace_all_randomness():
    vit = tiny().train()
    ones = torch.ones(4)
    g = torch.Generator().manual_seed(5)
    draws = {
        i: BlockDraws(torch.randn(20, 3, generator=g), (torch.rand(3, 20, 32, generator=g) > 0.1).float(), ones, ones)
        for i in range(4)
    }
    first, second = run_vit(vit, images(), draws), run_vit(vit, images(), draws)
    torch.testing.assert_close(first.logits_BK, second.logits_BK, rtol=0, atol=0)
    none = {i: draw._replace(keep_attention_B=ones * 0, keep_mlp_B=ones * 0) for i, draw in draws.items()}
    kept_first = run_vit(vit, images(), {**none, 0: draws[0]}).features_BD
    expected = vit.norm(vit.blocks[0](vit._pos_embed(vit.patch_embed(images()))))[:, 0]
    torch.testing.assert_close(kept_first, expected)


def test_dropless_predictions_do_not_depend_on_the_neighbours():
    vit, batch = tiny().eval(), images(6)
    together = vit(batch)
    torch.testing.assert_close(torch.cat([vit(x[None]) for x in batch]), together)
    torch.testing.assert_close(vit(batch.flip(0)).flip(0), together)


def test_official_capacity_in_evaluation_does():
    torch.manual_seed(0)
    vit = tiny(GMoESpec(pattern="every_two", num_experts=4, capacity_factor=0.5, eval_capacity=True)).eval()
    records = run_vit(vit, images(6)).records
    assert not all(bool(r.routing.kept_NK.all()) for r in records.values())


@pytest.mark.parametrize("spec", [GMoESpec(pattern=["S"], num_experts=1), GMoESpec(pattern=["S"], num_experts=5)])
def test_one_block_one_image(spec):
    vit = tiny(spec, depth=1).train()
    out = run_vit(vit, images(1))
    (out.logits_BK.sum() + sum(out.aux.values())).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vit.parameters())


def test_copies_and_pickles_are_independent():
    vit = tiny().train()
    vit(images())
    for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        twin.eval()
        assert vit.blocks[1].mlp.training and vit.blocks[1].mlp.experts.training
        torch.testing.assert_close(twin(images()), copy.deepcopy(vit).eval()(images()))
    buffer = io.BytesIO()
    torch.save(vit.state_dict(), buffer)


def test_not_finite_activations_are_named():
    bad = images()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(RunFailed, match="not finite"):
        tiny().eval()(bad)


def test_bf16_autocast_keeps_the_gate_in_float32():
    vit = tiny().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_vit(vit, images())
    assert all(record.scores_NE.dtype == torch.float32 for record in out.records.values())
    assert torch.isfinite(out.logits_BK).all()


def test_second_order_through_a_sparse_block():
    vit = tiny(GMoESpec(pattern=["F", "S"], num_experts=2, projection=4), depth=2).double().eval()
    x = images(2, dtype=torch.float64)
    weight = vit.blocks[1].mlp.experts.w1
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def slope(at):
        """Gradient norm with respect to the first projection, as a function of expert weights."""
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.func.functional_call(vit, {"blocks.1.mlp.experts.w1": at}, (x,))
        (g,) = torch.autograd.grad(out.square().sum(), vit.patch_embed.proj.weight, create_graph=True)
        return g.square().sum()

    at = weight.detach().clone().requires_grad_()
    (exact,) = torch.autograd.grad(slope(at), at)
    step = 1e-5
    numeric = (slope((at + step * direction).detach()) - slope((at - step * direction).detach())) / (2 * step)
    torch.testing.assert_close((exact * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


# Key maps


def test_official_names_round_trip():
    vit = tiny()
    official = to_official(vit.state_dict())
    assert official["model.blocks.1.mlp." + COUNT] == 3
    assert official["model.blocks.1.mlp.experts.batched_fc2_w"].shape == (3, 32, 16)
    for state in (official, to_official(vit.state_dict(), prefix="")):
        other = tiny(seed=9)
        load_official(other, state)
        for name, value in vit.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


def test_old_files_lack_the_count_and_may_have_three_axes_in_biases():
    vit = tiny(GMoESpec(pattern="every_two", num_experts=3, gate="linear"))
    official = {n: v for n, v in to_official(vit.state_dict()).items() if not n.endswith(COUNT)}
    assert "model.blocks.1.mlp.gates.0.wg.weight" in official
    deep = {n: v.unsqueeze(1) if n.endswith(("fc1_bias", "fc2_bias")) else v for n, v in official.items()}
    load_official(tiny(vit.gmoe), deep)


def broken(change):
    official = to_official(tiny().state_dict())
    change(official)
    return official


def replace(name, function):
    return lambda state: state.update({name: function(state[name])})


FC1, FC2 = "model.blocks.1.mlp.experts.batched_fc1_w", "model.blocks.1.mlp.experts.batched_fc2_w"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.norm.bias"), "1 missing: norm.bias"),
        (lambda s: s.pop(FC2), "1 missing: blocks.1.mlp.experts.w2"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), "1 unexpected: extra"),
        (lambda s: s.update({"model.blocks.1.mlp.wrong": torch.zeros(1)}), "model.blocks|blocks.1.mlp.wrong"),
        (replace(FC1, lambda w: w.transpose(1, 2)), r"experts.w1 \(3, 16, 32\) instead of \(3, 32, 16\)"),
        (replace(FC2, lambda w: w[:, :5]), r"experts.w2 \(3, 16, 5\) instead of \(3, 16, 32\)"),
        (replace(FC2, lambda w: w[0]), "instead of"),
        (replace("model.blocks.1.mlp." + COUNT, lambda n: n + 3), "says 6 experts, the tensors hold 3"),
        (replace("model.blocks.1.mlp.experts.batched_fc1_bias", lambda b: b.reshape(3, 2, 16)), "instead of"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message):
    vit = tiny(seed=4)
    before = {n: v.clone() for n, v in vit.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_official(vit, broken(change))
    assert all(torch.equal(v, before[n]) for n, v in vit.state_dict().items())


def test_the_files_of_several_ranks_merge():
    vit = tiny(GMoESpec(pattern="every_two", num_experts=4))
    official = to_official(vit.state_dict())
    shares = [{n: v.chunk(2)[rank] if ".experts.batched" in n else v for n, v in official.items()} for rank in range(2)]
    with pytest.raises(CheckpointError, match="merge"):
        from_official(shares[0])
    torch.testing.assert_close(merge_ranks(shares), official)
    shares[1]["model.norm.bias"] = shares[1]["model.norm.bias"] + 1
    with pytest.raises(CheckpointError, match=r"norm\.bias of rank 1"):
        merge_ranks(shares)
    del shares[1]["model.norm.bias"]
    with pytest.raises(CheckpointError, match="do not name the same"):
        merge_ranks(shares)
    with pytest.raises(CheckpointError, match="no file"):
        merge_ranks([])


@pytest.mark.parametrize("name, deep", [("torchvision:resnet18", True), ("mnist_cnn", False)])
def test_official_erm_round_trip(name, deep):
    spec = BackboneSpec(name=name)
    state = build_classifier(spec, 5).state_dict()
    official = erm_to_official(state, spec, deep)
    assert len(official) == 2 * len(state)
    first = "featurizer.network.conv1.weight" if deep else "featurizer.conv1.weight"
    assert official[first].data_ptr() == official[first.replace("featurizer", "network.0")].data_ptr()
    torch.testing.assert_close(erm_from_official(official, spec), dict(state))
    with pytest.raises(CheckpointError, match="missing"):
        erm_from_official({n: v for n, v in official.items() if "conv1.weight" not in n}, spec)
    with pytest.raises(CheckpointError, match="differ"):
        erm_from_official({**official, first: official[first] + 1}, spec)


# As a student


def test_a_sparse_transformer_is_a_backbone():
    assert feature_dim(SMALL) == 192
    torch.manual_seed(0)
    student = build_student(SMALL, 5).eval()
    x = images(2, side=32)
    assert student.extract(x).shape == (2, 192) and student(x).shape == (2, 5)
    state = student.state_dict()
    classifier = build_classifier(SMALL, 5).eval()
    classifier.load_state_dict(student_to_classifier(SMALL, state))
    torch.testing.assert_close(classifier(x), student(x))
    torch.testing.assert_close(classifier_to_student(SMALL, classifier.state_dict()), dict(state))
    with pytest.raises(pydantic.ValidationError, match="gmoe has no meaning"):
        BackboneSpec(name="torchvision:resnet18", gmoe={})


def test_a_sparse_student_takes_the_inner_step_of_meta_distillation():
    torch.manual_seed(0)
    student = build_student(SMALL, 3).eval()
    x = images(2, side=32)
    target = torch.randn(2, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
    result = inner_step(student, x, target, uniform_rates(student, 0.1), graph="full")
    student.run(x, result.adapted).logits_BK.square().sum().backward()
    assert target.grad is not None and float(target.grad.abs().sum()) > 0
    moved = result.adapted["features.0.blocks.8.mlp.experts.w1"]
    assert not torch.equal(moved, student.get_parameter("features.0.blocks.8.mlp.experts.w1"))


def test_mnist_cnn_is_a_backbone():
    spec = BackboneSpec(name="mnist_cnn", channels=2)
    assert feature_dim(spec) == 128
    network, student = MnistCNN(2, 7), build_student(spec, 7)
    student.load_state_dict(classifier_to_student(spec, network.state_dict()))
    x = torch.randn(2, 2, 28, 28)
    torch.testing.assert_close(student(x), network(x))
    assert (
        sum(p.numel() for p in MnistCNN(1).parameters()) == sum(p.numel() for p in network.parameters()) - 7 * 129 - 576
    )
