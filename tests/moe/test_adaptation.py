"""Every adaptation method of the registry, and what is particular to each."""

import pytest
import torch

from moe.adaptation.base import ADAPTATIONS, make
from moe.adaptation.bn import estimate
from moe.aggregator import Aggregator
from moe.backbones import build_student
from moe.errors import SpecError
from moe.losses import entropy, l2_loss
from moe.specs import BackboneSpec
from tests.moe.helpers import MOE, student, wake


@pytest.fixture
def world():
    model = wake(student(MOE))
    torch.manual_seed(4)
    images, tokens = torch.randn(9, 1, 12, 12), torch.randn(9, 3, 32)
    return model, images, tokens, Aggregator(32, 3, heads=4).eval()


@pytest.mark.parametrize("name", ADAPTATIONS.names())
def test_every_method_keeps_its_input_and_repeats_itself(name, world):
    model, images, tokens, aggregator = world
    before = {n: v.clone() for n, v in {**model.state_dict(), **aggregator.state_dict()}.items()}
    inputs = images.clone(), tokens.clone()
    method = make(name)

    def adapt():
        return method.adapt(model, images, tokens, aggregator, torch.Generator().manual_seed(7))

    first, second = adapt(), adapt()
    after = {**model.state_dict(), **aggregator.state_dict()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(inputs[0], images) and torch.equal(inputs[1], tokens)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert first.delta.keys() == second.delta.keys()
    assert all(torch.equal(first.delta[n], second.delta[n]) for n in first.delta)
    assert all(n in model.state_dict() and n.startswith("features.") for n in first.delta)
    assert not any(v.requires_grad for v in first.delta.values())
    with torch.no_grad():
        assert torch.equal(first.model(images), model.run(images, first.delta).logits_BK)
        assert torch.equal(first.model(images), model(images)) == (name == "none")
    assert first.model is not model


@pytest.mark.parametrize("name", ADAPTATIONS.names())
def test_every_method_refuses_an_empty_batch_and_takes_a_single_image(name, world):
    model, images, tokens, aggregator = world
    with pytest.raises(SpecError, match="empty"):
        make(name).adapt(model, images[:0], tokens[:0], aggregator)
    result = make(name).adapt(model, images[:1], tokens[:1], aggregator)
    assert bool(torch.isfinite(model.run(images, result.delta).logits_BK).all())


def test_distill_is_one_plain_gradient_step(world):
    model, images, tokens, aggregator = world
    result = make("distill", {"inner_lr": 0.2, "measure_after": True}).adapt(model, images, tokens, aggregator)
    loss = l2_loss(model.extract(images), aggregator(tokens).feat_BD.detach())
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("features."):
            torch.testing.assert_close(result.delta[name], parameter - 0.2 * parameter.grad)
    assert result.loss_before == pytest.approx(float(loss.detach())) and result.loss_after < result.loss_before


def test_distill_with_learned_rates_moves_only_those(world):
    model, images, tokens, aggregator = world
    rates = {"features.0.0.weight": 0.1, "features.1.1.bias": 0.3}
    result = make("distill", {"rates": rates, "steps": 2}).adapt(model, images, tokens, aggregator)
    assert set(result.delta) == set(rates)
    with pytest.raises(SpecError, match=r"other\.weight"):
        make("distill", {"rates": {"other.weight": 0.1}}).adapt(model, images, tokens, aggregator)
    with pytest.raises(SpecError, match="needs the experts"):
        make("distill").adapt(model, images)
    with pytest.raises(SpecError, match="9 support images, but 4 rows"):
        make("distill").adapt(model, images, tokens[:4], aggregator)


def test_norm_subset_moves_norm_layers_only(world):
    model, images, tokens, aggregator = world
    result = make("distill", {"adapt": "norm"}).adapt(model, images, tokens, aggregator)
    assert set(result.delta) == {f"features.{i}.1.{t}" for i in range(4) for t in ("weight", "bias")}


def test_bn_takes_the_statistics_of_the_support(world):
    model, images, *_ = world
    delta = make("bn").adapt(model, images).delta
    first = model.features[0][0](images)
    torch.testing.assert_close(delta["features.0.1.running_mean"], first.mean((0, 2, 3)).detach())
    torch.testing.assert_close(delta["features.0.1.running_var"], first.var((0, 2, 3)).detach())
    half = make("bn", {"prior": 9}).adapt(model, images).delta
    own = model.state_dict()["features.0.1.running_mean"]
    torch.testing.assert_close(half["features.0.1.running_mean"], (own + first.mean((0, 2, 3)).detach()) / 2)
    pieces = estimate(model, images, batch_size=3)["features.0.1.running_mean"]
    torch.testing.assert_close(pieces, first.mean((0, 2, 3)).detach())


def test_bn_needs_batchnorm_and_more_than_one_value():
    torch.manual_seed(0)
    vit = build_student(BackboneSpec(name="timm:test_vit", image_size=32), 3).eval()
    with pytest.raises(SpecError, match="no BatchNorm"):
        make("bn").adapt(vit, torch.randn(2, 3, 32, 32))
    assert make("tent", {"steps": 1}).adapt(vit, torch.randn(2, 3, 32, 32)).delta
    deep = build_student(BackboneSpec(name="torchvision:resnet18"), 3).eval()
    with pytest.raises(SpecError, match=r"1 image\(s\)"):
        make("bn").adapt(deep, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("binary", 1)])
def test_tent_lowers_the_entropy(task, outputs):
    model = student(outputs=outputs)
    images = torch.randn(20, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    result = make("tent", {"lr": 1e-2, "batch_size": 8}, task).adapt(model, images)
    assert result.loss_after < result.loss_before
    with torch.no_grad():
        found = float(entropy(task, result.model(images)))
    assert found == pytest.approx(result.loss_after)


def test_tent_refuses_regression():
    with pytest.raises(SpecError, match="no entropy"):
        make("tent", task="regression").adapt(student(outputs=1), torch.randn(2, 1, 12, 12))
