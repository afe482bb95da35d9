"""The meta step: gradients against finite differences, orders against each other, nothing changed in place."""

import pytest
import torch
from torch.func import functional_call

from moe.errors import SpecError
from moe.inner import adapted_parameters, inner_step, uniform_rates
from moe.losses import l2_loss, task_loss
from moe.meta_step import Episode
from moe.specs import StudentMoESpec
from tests.moe.helpers import MOE, episode, gradients, module, student

CASES = {
    "plain": {},
    "moe": {"moe": MOE},
    "two_steps": {"inner_steps": 2},
    "norm": {"adapt": "norm"},
    "rates": {"learn_rates": True},
    "zero": {"exclusion": "zero"},
    "none": {"exclusion": "none"},
}


def numerical(network, batch, name, index, step=1e-6):
    """Central difference of the total loss with respect to one parameter element."""
    parameter = dict(network.named_parameters())[name]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[index] += sign * step
        values.append(float(network(batch).total.detach()))
        with torch.no_grad():
            parameter.view(-1)[index] -= sign * step
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_second_order_gradient_equals_finite_differences(options):
    network, batch = module(**options), episode(dtype=torch.float64)
    found = gradients(network, batch)
    g = torch.Generator().manual_seed(3)
    checked = 0
    for name, gradient in found.items():
        index = int(torch.randint(gradient.numel(), (1,), generator=g))
        expected = numerical(network, batch, name, index)
        assert float(gradient.view(-1)[index]) == pytest.approx(expected, rel=1e-4, abs=1e-8), name
        checked += abs(expected) > 1e-8
    assert checked > 15
    assert any(name.startswith("aggregator.transformer") for name in found)
    assert not any(name.startswith("aggregator.mlp") for name in found)


def test_second_order_differs_from_first_order():
    batch = episode(dtype=torch.float64)
    second, first = gradients(module(), batch), gradients(module("first"), batch)
    name = "student.features.1.0.weight"
    assert (second[name] - first[name]).norm() > 1e-3 * second[name].norm()
    assert not any(name.startswith("aggregator") for name in first)


@pytest.mark.parametrize("options", [{}, {"moe": MOE}, {"adapt": "norm"}, {"learn_rates": True}], ids=str)
def test_exact_aggregator_gives_autograds_aggregator_gradient(options):
    batch = episode(dtype=torch.float64)
    second, exact = gradients(module(**options), batch), gradients(module("exact_aggregator", **options), batch)
    first = gradients(module("first", **options), batch)
    for name, gradient in second.items():
        if name.startswith(("aggregator", "rates")):
            torch.testing.assert_close(exact[name], gradient, rtol=1e-9, atol=1e-14)
    for name in first:
        torch.testing.assert_close(exact[name], first[name], rtol=1e-9, atol=1e-14)


def test_exact_aggregator_equals_a_jacobian_vector_product_in_forward_mode():
    network, batch = module("exact_aggregator"), episode(dtype=torch.float64)
    model = network.student
    target = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    network.aggregator.forward = lambda tokens: type("Out", (), {"feat_BD": target})()
    network(batch).total.backward()
    inner = inner_step(model, batch.support, target.detach(), uniform_rates(model, 0.3))
    moved = {name: value.requires_grad_() for name, value in inner.adapted.items()}
    loss = task_loss("multiclass", model.run(batch.query, moved).logits_BK, batch.query_labels)
    slopes = dict(zip(moved, torch.autograd.grad(loss, list(moved.values())), strict=True))
    own = {name.removeprefix("features."): p.detach() for name, p in adapted_parameters(model).items()}

    def features(parameters):
        return functional_call(model.features, parameters, (batch.support,)).flatten(1)

    _, change = torch.func.jvp(features, (own,), ({n: slopes[f"features.{n}"] for n in own},))
    torch.testing.assert_close(target.grad, 0.3 * 2 / target.numel() * change, rtol=1e-9, atol=1e-14)


def test_the_loss_is_that_of_the_adapted_student():
    network, batch = module(), episode(dtype=torch.float64)
    losses = network(batch)
    target = network.aggregator(batch.tokens_SED[torch.arange(5)[:, None], others(batch.owners_S, 3)]).feat_BD
    features = network.student.extract(batch.support)
    inner = l2_loss(features, target)
    names = list(adapted_parameters(network.student))
    found = torch.autograd.grad(inner, list(adapted_parameters(network.student).values()))
    with torch.no_grad():
        for name, gradient in zip(names, found, strict=True):
            dict(network.student.named_parameters())[name].sub_(0.3 * gradient)
    expected = task_loss("multiclass", network.student(batch.query), batch.query_labels)
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.parts["inner_loss"], inner)


def others(owners, experts):
    return torch.tensor([[e for e in range(experts) if e != owner] for owner in owners.tolist()])


@pytest.mark.parametrize("order", ["second", "first", "exact_aggregator"])
def test_nothing_is_changed_in_place_and_everything_stays_in_evaluation_mode(order):
    network, batch = module(order, moe=MOE, loss_before=True), episode(dtype=torch.float64)
    network.train()
    modes = {name: m.training for name, m in network.named_modules() if m.training}
    assert set(modes) == {"", "student.moe"} | {n for n in modes if n.startswith("student.moe.")}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    values = {name: value.clone() for name, value in vars(batch).items()}
    losses = network(batch)
    losses.total.backward()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(torch.equal(values[name], value) for name, value in vars(batch).items())
    assert set(losses.parts) == {"query_loss", "inner_loss", "balance", "loss_before"}
    assert not any(value.requires_grad for value in losses.parts.values())


def test_the_episode_loss_can_be_measured_without_gradients():
    batch = episode(dtype=torch.float64)
    expected = module()(batch).total
    for order in ("second", "first", "exact_aggregator"):
        with torch.no_grad():
            total = module(order)(batch).total
        assert not total.requires_grad
        torch.testing.assert_close(total, expected.detach())


def test_binary_and_regression_tasks():
    for task in ("binary", "regression"):
        batch = episode(outputs=1, dtype=torch.float64)
        network = module(outputs=1, task=task)
        found = gradients(network, batch)
        name = "student.classifier.0.weight"
        assert float(found[name].view(-1)[3]) == pytest.approx(numerical(network, batch, name, 3), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 3, 4), (6, 1, 1)], ids=str)
def test_smallest_episodes(sizes):
    support, query, experts = sizes
    network = module(exclusion="none" if experts == 1 else "drop")
    found = gradients(network, episode(support, query, experts, dtype=torch.float64))
    assert all(bool(torch.isfinite(g).all()) for g in found.values())


def test_bfloat16_is_close_and_keeps_float32_gradients():
    batch = episode()
    full, half = (gradients(module(dtype=torch.float32, precision=p), batch) for p in ("fp32", "bf16"))
    a, b = (torch.cat([g.flatten() for n, g in x.items() if n.startswith("student")]) for x in (full, half))
    assert b.dtype == torch.float32
    assert 0 < float((a - b).norm() / a.norm()) < 0.1


def test_outer_autocast_with_the_log_pass_keeps_all_gradients():
    batch = episode()
    network = module(dtype=torch.float32, loss_before=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = network(batch).total
    total.backward()
    expected = gradients(module(dtype=torch.float32), batch)
    for name, parameter in network.named_parameters():
        if name in expected:
            assert parameter.grad is not None, name
    name = "student.features.0.0.weight"
    found = dict(network.named_parameters())[name].grad
    assert float((found - expected[name]).norm() / expected[name].norm()) < 0.3


def test_attention_students_can_be_differentiated_twice():
    from moe.aggregator import Aggregator
    from moe.backbones import build_student
    from moe.meta_step import EpisodeModule
    from moe.specs import BackboneSpec, MetaStepSpec

    torch.manual_seed(0)
    model = build_student(BackboneSpec(name="timm:test_vit", image_size=32), 3)
    aggregator = Aggregator(model.feature_dim, 3, heads=4)
    batch = Episode(
        torch.randn(3, 3, 32, 32),
        torch.randn(2, 3, 32, 32),
        torch.tensor([0, 2]),
        torch.randn(3, 2, model.feature_dim),
        torch.zeros(3, dtype=torch.long),
    )
    for order in ("second", "exact_aggregator"):
        found = gradients(EpisodeModule(model, aggregator, MetaStepSpec(inner_lr=0.1, order=order)), batch)
        assert float(found["aggregator.transformer.layers.0.1.fn.net.0.weight"].abs().max()) > 0


def test_capacity_applies_to_the_block_while_training_only():
    tight = StudentMoESpec(num_experts=4, top_k=1, capacity_factor=0.3, dropless=False)
    network, batch = module(moe=tight), episode(query=8, dtype=torch.float64)
    trained = network.train()(batch).total
    evaluated = network.train(False)(batch).total
    assert float((trained - evaluated).detach().abs()) > 1e-6


def test_problems_are_told():
    network, batch = module(), episode(dtype=torch.float64)
    with pytest.raises(SpecError, match="feature width"):
        inner_step(network.student, batch.support, torch.zeros(5, 7), uniform_rates(network.student, 0.1))
    frozen = student()
    frozen.requires_grad_(False)
    with pytest.raises(SpecError, match="no feature parameters"):
        adapted_parameters(frozen)
    with pytest.raises(SpecError, match="no expert to look at"):
        module()(episode(experts=1, dtype=torch.float64))
