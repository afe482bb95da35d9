"""EATA: which images count, with what weight, and the Fisher regulariser."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.adaptation.base import make
from moe.adaptation.eata import ANCHOR, AVERAGE, FISHER, Config, Selection, fisher_information, redundancy
from moe.adaptation.tent import Method as Tent
from moe.errors import SpecError
from moe.inner import adapted_parameters
from tests.moe.helpers import student


def images(count=20, seed=1):
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_unreliable_images_do_not_count():
    sure, unsure = [8.0, 0.0, 0.0], [0.1, 0.0, 0.0]
    selection = Selection(Config(), "multiclass")
    loss = selection(torch.tensor([sure, unsure, sure]))
    p = torch.tensor(sure).softmax(0)
    entropy = -(p * p.log()).sum()
    assert float(loss) == pytest.approx(float(entropy * torch.exp(0.4 * math.log(3) - entropy)), rel=1e-5)
    assert selection.facts() == {"seen": 3, "reliable": 2, "chosen": 2}
    torch.testing.assert_close(selection.average_C, p)
    assert Selection(Config(), "multiclass")(torch.tensor([unsure])) is None


def test_images_like_the_average_are_redundant_and_the_average_moves():
    first, second = [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]
    selection = Selection(Config(redundant=0.5), "multiclass")
    assert selection(torch.tensor([first])) is not None  # nothing is redundant at the beginning
    before = selection.average_C
    assert selection(torch.tensor([first, first])) is None and torch.equal(selection.average_C, before)
    assert selection(torch.tensor([first, second])) is not None
    torch.testing.assert_close(selection.average_C, 0.9 * before + 0.1 * torch.tensor(second).softmax(0))
    assert selection.facts() == {"seen": 5, "reliable": 5, "chosen": 2} and selection.steps == 2


def test_weights_are_not_differentiated():
    logits = torch.tensor([[4.0, 0.0, 0.0]], requires_grad=True)
    Selection(Config(reliable=1.0), "multiclass")(logits).backward()
    plain = torch.tensor([[4.0, 0.0, 0.0]], requires_grad=True)
    p = plain.softmax(-1)
    entropy = -(p * p.log()).sum()
    (entropy * float(torch.exp(math.log(3) - entropy.detach()))).backward()
    torch.testing.assert_close(logits.grad, plain.grad)


def test_a_binary_task_has_two_classes():
    selection = Selection(Config(), "binary")
    assert selection(torch.tensor([[6.0], [0.1], [-6.0]])) is not None
    assert selection.facts()["reliable"] == 2 and selection.average_C.shape == (2,)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5000))
def test_redundancy_lies_between_the_published_values(classes):
    value = redundancy(classes)
    assert 0 < value <= 1 and value > 1 / math.sqrt(classes)  # an even average leaves room for every class
    assert redundancy(10) == pytest.approx(0.4) and redundancy(1000) == pytest.approx(0.05)
    assert redundancy(classes + 1) <= value


@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("binary", 1)])
def test_entropy_falls_and_only_norm_layers_move(task, outputs):
    model = student(outputs=outputs)
    options = {"lr": 0.05, "reliable": 1.0, "redundant": 1.0, "batch_size": 8}
    result = make("eata", options, task).adapt(model, images())
    assert result.loss_after < result.loss_before and result.steps == 20
    norm = set(adapted_parameters(model, "norm"))
    assert norm < set(result.delta) and all(n in norm or ".running_" in n for n in result.delta)
    assert result.facts["chosen"] <= result.facts["reliable"] <= result.facts["seen"] == 160


def test_nothing_reliable_moves_nothing():
    model = student()
    result = make("eata", {"reliable": 1e-6, "statistics": False}).adapt(model, images())
    assert result.steps == 0 and result.facts["chosen"] == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in result.delta.items())


def test_without_selection_and_weights_it_is_entropy_minimisation():
    """With one step on all images, reliable=1 and entropies weighted alike, the direction is Tent's."""
    model = student()
    rows = images(1)
    options = {"statistics": False, "steps": 1}
    eata = make("eata", {**options, "lr": 0.1, "reliable": 1.0, "momentum": 0.0}).adapt(model, rows)
    names = list(adapted_parameters(model, "norm"))
    from moe.losses import entropy

    loss = entropy("multiclass", model(rows))
    gradients = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
    weight = math.exp(math.log(3) - float(loss.detach()))
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(eata.delta[name], model.state_dict()[name] - 0.1 * weight * gradient)
    assert Tent.reset == make("eata").reset == "follow"


def test_the_fisher_regulariser_holds_back():
    model, rows = student(), images()
    options = {"lr": 0.05, "reliable": 1.0, "redundant": 1.0, "momentum": 0.0}
    free = make("eata", options).adapt(model, rows)
    held = make("eata", {**options, "fisher": 50.0}).adapt(model, rows)
    norm = list(adapted_parameters(model, "norm"))
    own = model.state_dict()
    weights = {n: held.memory[FISHER + n] for n in norm}

    def distance(result):
        return float(sum((weights[n] * (result.delta[n] - own[n]).square()).sum() for n in norm))

    assert distance(held) < 0.8 * distance(free)
    assert all(torch.equal(held.memory[ANCHOR + n], own[n]) for n in norm)
    assert not any(name.startswith((FISHER, ANCHOR)) for name in free.memory)


def test_fisher_information_is_the_mean_of_squared_batch_gradients():
    model, rows = student(), images(6)
    names = list(adapted_parameters(model, "norm"))
    found = fisher_information(model, rows, "multiclass", names, batch_size=3)
    expected = {name: torch.zeros_like(value) for name, value in found.items()}
    for piece in rows.split(3):
        logits = model(piece)
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        gradients = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += gradient.square() / 2
    for name in names:
        torch.testing.assert_close(found[name], expected[name])
    given_ = {**{FISHER + n: torch.full_like(v, 7.0) for n, v in found.items()}}
    kept = make("eata", {"fisher": 1.0, "steps": 1}).adapt(model, rows, memory=given_).memory
    assert all(torch.equal(kept[name], value) for name, value in given_.items())


def test_memory_continues_average_and_momentum():
    model, rows = student(), images()
    method = make("eata", {"lr": 0.05, "reliable": 1.0, "redundant": 1.0, "steps": 3})
    first = method.adapt(model, rows)
    fresh, after = method.adapt(model, rows), method.adapt(model, rows, memory=first.memory)
    assert AVERAGE in first.memory and any(n.startswith("momentum_buffer/") for n in first.memory)
    assert any(not torch.equal(fresh.delta[n], after.delta[n]) for n in fresh.delta)


def test_regression_is_refused():
    with pytest.raises(SpecError, match="distribution"):
        make("eata", task="regression").adapt(student(outputs=1), images())


@pytest.mark.parametrize("task, outputs", [("multiclass", 4), ("binary", 1)])
def test_the_gradient_of_the_entropy_is_finite_where_a_probability_is_zero(task, outputs):
    from moe.adaptation._norm import entropy_rows, probabilities

    logits = (torch.eye(4)[:, :outputs] * 400).requires_grad_()
    assert probabilities(task, logits).min() == 0
    entropy_rows(task, logits).sum().backward()
    assert logits.grad.isfinite().all()
