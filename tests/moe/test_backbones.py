"""Backbones, the three views of a classifier, and the official key maps at real sizes."""

import pydantic
import pytest
import torch

from moe.aggregator import Aggregator
from moe.backbones import (
    build_classifier,
    build_student,
    classifier_to_student,
    feature_dim,
    student_to_classifier,
)
from moe.errors import CheckpointError, SpecError
from moe.jetpack_specs import JetViTSpec
from moe.keymaps import meta_dmoe as keymap
from moe.specs import BackboneSpec, StudentMoESpec

SPECS = {
    "tiny": (BackboneSpec(name="tiny_cnn", channels=1, width=4), 64),
    "resnet18": (BackboneSpec(name="torchvision:resnet18", channels=8), 512),
    "resnet50": (BackboneSpec(name="torchvision:resnet50"), 2048),
    "densenet121": (BackboneSpec(name="torchvision:densenet121"), 1024),
    "mobilenet": (BackboneSpec(name="mobilenet_v2_sort", channels=2), 1280),
    "focus": (BackboneSpec(name="vit_small_focus", image_size=28), 384),
    "timm_nested_head": (BackboneSpec(name="timm:test_convnext", channels=5), 64),
    "timm_vit": (BackboneSpec(name="timm:test_vit", image_size=32), 64),
}


@pytest.mark.parametrize("spec, dim", SPECS.values(), ids=SPECS)
def test_student_is_its_classifier_with_other_names(spec, dim):
    torch.manual_seed(0)
    classifier = build_classifier(spec, 7).eval()
    student = build_student(spec, 7).eval()
    state = classifier.state_dict()
    renamed = classifier_to_student(spec, state)
    student.load_state_dict(renamed)
    assert set(renamed) == set(student.state_dict()) and len(renamed) == len(state)
    assert all(name.startswith(("features.", "classifier.0.")) for name in renamed)
    back = student_to_classifier(spec, student.state_dict())
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    x = torch.randn(2, spec.channels, spec.image_size or 32, spec.image_size or 32)
    with torch.no_grad():
        features = student.extract(x)
        assert features.shape == (2, dim) and student.feature_dim == feature_dim(spec) == dim
        if "densenet" not in spec.name:
            torch.testing.assert_close(student(x), classifier(x))
        assert student(x[:1]).shape == (1, 7)


def test_densenet_features_have_no_last_relu_unless_asked_for():
    spec = BackboneSpec(name="torchvision:densenet121")
    with_relu = spec.model_copy(update={"last_relu": True})
    torch.manual_seed(0)
    classifier = build_classifier(spec, 3).eval()
    plain, rectified = build_student(spec, 3).eval(), build_student(with_relu, 3).eval()
    for student in (plain, rectified):
        student.load_state_dict(classifier_to_student(spec, classifier.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert float(plain.extract(x).min()) < 0 <= float(rectified.extract(x).min())
        torch.testing.assert_close(rectified(x), classifier(x))
        assert not torch.allclose(plain(x), classifier(x))


def test_tiny_width_and_channels():
    assert feature_dim(BackboneSpec(name="tiny_cnn")) == 256
    model = build_classifier(BackboneSpec(name="tiny_cnn", channels=3, width=16), 10)
    assert 60_000 < sum(p.numel() for p in model.parameters()) < 70_000
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 10)


def test_new_head_has_the_asked_width_and_stem_the_asked_channels():
    model = build_classifier(BackboneSpec(name="torchvision:resnet18", channels=8), 1)
    assert model.conv1.weight.shape == (64, 8, 7, 7) and model.fc.weight.shape == (1, 512)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "torchvision:resnet5"}, "Did you mean 'torchvision:resnet50'"),
        ({"name": "tiny"}, "Did you mean 'tiny_cnn'"),
        ({"name": "timm:"}, "no backbone named"),
        ({"name": "tiny_cnn", "width": 0}, "greater than or equal to 1"),
        ({"name": "torchvision:resnet18", "width": 8}, "scales tiny_cnn only"),
        ({"name": "vit_small_focus", "image_size": 96}, "use 98"),
        ({"name": "torchvision:resnet18", "last_relu": True}, "DenseNet family"),
        ({"name": "tiny_cnn", "chanels": 1}, "Extra inputs"),
        ({"name": "jetvit", "jetvit": JetViTSpec(), "gmoe": {"drop_path": 0.5}}, "set jetvit.drop_path"),
    ],
)
def test_wrong_specs_are_refused(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        BackboneSpec(**fields)


def test_unknown_timm_models_and_heads_are_refused():
    with pytest.raises(SpecError, match=r"no model named 'resnet18x'.*resnet18"):
        build_classifier(BackboneSpec(name="timm:resnet18x"), 2)
    with pytest.raises(SpecError, match="exactly one is needed"):
        build_classifier(BackboneSpec(name="timm:deit_tiny_distilled_patch16_224"), 2)


def test_wrong_checkpoints_are_named():
    spec = BackboneSpec(name="tiny_cnn", width=2)
    state = build_classifier(spec, 3).state_dict()
    student = classifier_to_student(spec, state)
    with pytest.raises(CheckpointError, match=r"1 missing: block1\.0\.weight"):
        classifier_to_student(spec, {n: v for n, v in state.items() if n != "block1.0.weight"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: other"):
        classifier_to_student(spec, {**state, "other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"block2\.0\.weight \(3,\) instead of \(4, 2, 3, 3\)"):
        classifier_to_student(spec, {**state, "block2.0.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"features\.0\.0\.weight"):
        student_to_classifier(spec, {n: v for n, v in student.items() if n != "features.0.0.weight"})
    with pytest.raises(CheckpointError, match=r"The head 'fc\.weight'.*nothing"):
        classifier_to_student(spec, student)
    moe = build_student(spec, 3, StudentMoESpec(num_experts=2)).state_dict()
    with pytest.raises(CheckpointError, match="MoE block"):
        student_to_classifier(spec, moe)


@pytest.mark.parametrize("dataset, outputs", [("iwildcam", 182), ("camelyon17", 1), ("rxrx1", 1139), ("fmow", 62)])
def test_official_checkpoints_make_the_round_trip(dataset, outputs):
    spec = keymap.backbone_of(dataset)
    shapes = keymap.backbone_shapes("expert", spec, outputs)
    expert = {name: torch.zeros(shape) for name, shape in shapes.items()}
    student = classifier_to_student(spec, keymap.check_official(expert, shapes, "expert"))
    assert {n: tuple(v.shape) for n, v in student.items()} == keymap.backbone_shapes("student", spec, outputs)
    assert {n: tuple(v.shape) for n, v in student_to_classifier(spec, student).items()} == shapes
    assert student["classifier.0.weight"].shape[0] == outputs
    features = keymap.backbone_shapes("expert_feature", spec, outputs)
    assert set(features) == set(student) - {"classifier.0.weight", "classifier.0.bias"}
    if spec.name.endswith("resnet50"):
        assert "features.4.0.conv1.weight" in features and "features.7.2.bn3.num_batches_tracked" in features
    else:
        assert "features.0.denseblock1.denselayer1.norm1.num_batches_tracked" in features


def test_official_aggregator_round_trip():
    shapes = keymap.selector_shapes(2048, 182)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == pytest.approx(33.6e6 + 182 * 2049 + 4096, rel=0.01)
    model = Aggregator(32, 3, depth=2, heads=4, mlp_ratio=1.5)
    state = model.state_dict()
    arguments = keymap.selector_arguments(state, heads=4)
    assert arguments == {"dim": 32, "num_outputs": 3, "depth": 2, "heads": 4, "mlp_ratio": 1.5}
    copy = Aggregator(**arguments)
    copy.load_state_dict(keymap.check_official(state, keymap.selector_shapes(**arguments), "selector"))
    x = torch.randn(2, 3, 32)
    assert torch.equal(copy.eval()(x).feat_BD, model.eval()(x).feat_BD)
    with pytest.raises(CheckpointError, match="not an aggregator"):
        keymap.selector_arguments({"fc.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 missing: mlp\.1\.bias"):
        cut = {n: v for n, v in state.items() if n != "mlp.1.bias"}
        keymap.check_official(cut, keymap.selector_shapes(**arguments), "selector")


def test_official_file_names():
    files = keymap.official_files("camelyon17", 5, 3407)
    assert files.meta_student == "camelyon_5experts_seed3407_meta_student_best.pth"
    assert keymap.official_files("iwildcam", 10, 1).experts[7] == "iwildcam_10experts_seed1_7_exp_best.pth"
    assert files.pretrained_student == "camelyon_5experts_seed3407_pretrained_exp_best.pth"
    with pytest.raises(SpecError, match="no public checkpoints"):
        keymap.official_files("poverty", 3, 0)


def test_an_moe_student_cannot_be_exported_officially():
    spec = BackboneSpec(name="tiny_cnn", width=2)
    state = build_student(spec, 3, StudentMoESpec(num_experts=2)).state_dict()
    with pytest.raises(CheckpointError, match="cannot hold"):
        keymap.check_official(state, keymap.backbone_shapes("student", spec, 3), "student")


def test_moe_spec_bounds():
    with pytest.raises(pydantic.ValidationError, match="more than num_experts"):
        StudentMoESpec(num_experts=2, top_k=3)
