"""The fast layers of meta-training: the same values, gradients and names as PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from moe.aggregator import Aggregator
from moe.backbones import build_student
from moe.meta_step import Episode, EpisodeModule
from moe.specs import BackboneSpec, MetaStepSpec
from workers.second_order import (
    AffineBatchNorm2d,
    CarriedBatchNorm2d,
    SecondOrderConv2d,
    _Geometry,
    convolution,
    prepare,
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 0, 1), (2, 1, 2)])
def test_first_and_second_derivatives_of_the_convolution(stride, padding, groups, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True) if bias else None
    geometry = _Geometry((stride, stride), (padding, padding), (1, 1), groups)
    inputs = (x, w, b) if bias else (x, w)
    assert torch.autograd.gradcheck(lambda *a: convolution(a[0], a[1], a[2] if bias else None, geometry), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: convolution(a[0], a[1], a[2] if bias else None, geometry), inputs)


def test_it_works_when_only_weight_or_only_input_needs_a_gradient():
    geometry = _Geometry((1, 1), (1, 1), (1, 1), 1)
    for x_needs, w_needs in ((False, True), (True, False)):
        x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=x_needs)
        w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=w_needs)
        results = []
        for run in (lambda x, w: convolution(x, w, None, geometry), lambda x, w: torch.conv2d(x, w, padding=1)):
            leaf = x if x_needs else w
            (first,) = torch.autograd.grad(run(x, w).square().sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        torch.testing.assert_close(*results)


def meta_gradients(module: EpisodeModule, episode: Episode) -> dict[str, torch.Tensor]:
    module.zero_grad(set_to_none=True)
    module(episode).total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def setting(backbone: str, dtype=torch.float64, order: str = "second") -> tuple[EpisodeModule, Episode]:
    torch.manual_seed(0)
    student = build_student(BackboneSpec(name=backbone), 3)
    student.train()
    with torch.no_grad():  # statistics that are not 0 and 1
        student(torch.randn(8, 3, 32, 32) * 2 + 1)
        for parameter in student.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    student.eval()
    aggregator = Aggregator(student.feature_dim, 3, heads=4)
    module = EpisodeModule(student, aggregator, MetaStepSpec(inner_lr=1e-3, order=order)).to(dtype)
    tokens = torch.randn(4, 3, student.feature_dim, dtype=dtype)
    images = torch.randn(7, 3, 32, 32, dtype=dtype)
    return module, Episode(images[:4], images[4:], torch.tensor([0, 1, 2]), tokens, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("order", ["second", "exact_aggregator"])
@pytest.mark.parametrize(
    ("backbone", "folded"), [("tiny_cnn", 4), ("torchvision:resnet18", 20), ("mobilenet_v2_sort", 52)]
)
def test_meta_gradients_are_the_same(backbone, folded, order):
    module, episode = setting(backbone, order=order)
    expected = meta_gradients(module, episode)
    names = list(module.state_dict())
    assert prepare(module.student.features, episode.support) == folded
    found = meta_gradients(module, episode)
    assert list(module.state_dict()) == names and found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11 * scale)


def test_norms_that_precede_their_convolution_become_affine():
    module, episode = setting("torchvision:densenet121")
    before = module.student(episode.query)
    assert prepare(module.student.features, episode.support) >= 1
    kinds = [type(child) for child in module.student.modules()]
    assert AffineBatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    torch.testing.assert_close(module.student(episode.query), before, rtol=1e-9, atol=1e-9)


def test_training_mode_and_copies_behave_as_before():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    fast = copy.deepcopy(plain)
    prepare(fast, torch.randn(2, 3, 8, 8))
    fast = copy.deepcopy(fast)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(fast.train()(x), plain.train()(x))
    torch.testing.assert_close(fast[1].running_mean, plain[1].running_mean)
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    # The copy's convolution looks at the copy's norm, and functional parameters reach it.
    doubled = {"1.weight": 2 * fast[1].weight, "1.bias": 2 * fast[1].bias}
    torch.testing.assert_close(functional_call(fast, doubled, (x,)), 2 * plain(x), rtol=1e-4, atol=1e-5)


def test_a_pair_that_only_looks_like_one_is_left_alone():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(4, 4, 1)
            self.bn1 = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.conv1(torch.relu(self.bn1(x)))

    net = Reversed()
    with torch.no_grad():
        net.bn1.running_mean.fill_(0.5)
    x = torch.randn(3, 4, 2, 2)
    net.eval()
    before = net(x)
    assert prepare(net, x) == 0
    assert isinstance(net.conv1, SecondOrderConv2d) and not isinstance(net.bn1, CarriedBatchNorm2d)
    torch.testing.assert_close(net(x), before)


def test_autocast_is_followed():
    module, episode = setting("tiny_cnn", torch.float32)
    module.config = MetaStepSpec(inner_lr=1e-3, precision="bf16")
    expected = meta_gradients(module, episode)
    prepare(module.student.features, episode.support)
    found = meta_gradients(module, episode)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - value).norm()) <= 0.2 * float(value.norm()) + 1e-6, name
