"""Losses and predictions by task."""

import math

import pytest
import torch

from moe.errors import SpecError
from moe.losses import entropy, l2_loss, predict, task_loss, task_of


def test_multiclass():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    assert float(task_loss("multiclass", logits, torch.tensor([1, 1]))) == pytest.approx(
        -(math.log(0.75) + math.log(0.25)) / 2
    )
    assert predict("multiclass", logits).tolist() == [1, 0]


def test_binary_takes_both_label_shapes_and_a_single_row():
    logits = torch.tensor([[math.log(3)], [0.0]])
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    for labels in (torch.tensor([1, 0]), torch.tensor([[1.0], [0.0]])):
        assert float(task_loss("binary", logits, labels)) == pytest.approx(expected)
    assert predict("binary", logits).tolist() == [1, 0]  # a logit of exactly 0 is class 0
    assert predict("binary", logits[:1]).shape == (1,)


def test_regression():
    outputs = torch.tensor([[1.0], [3.0]])
    for labels in (torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [1.0]])):
        assert float(task_loss("regression", outputs, labels)) == 2.5
    assert predict("regression", outputs).tolist() == [1.0, 3.0]


def test_half_precision_outputs_give_a_float32_loss():
    assert task_loss("multiclass", torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1])).dtype == torch.float32
    assert l2_loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)).dtype == torch.float32


def test_entropy():
    assert float(entropy("multiclass", torch.zeros(2, 4))) == pytest.approx(math.log(4))
    assert float(entropy("binary", torch.zeros(3, 1))) == pytest.approx(math.log(2))
    x = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    two = torch.cat([x, torch.zeros_like(x)], dim=1)
    torch.testing.assert_close(entropy("binary", x), entropy("multiclass", two))
    assert torch.autograd.gradcheck(lambda z: entropy("binary", z), (x,))
    with pytest.raises(SpecError, match="no entropy"):
        entropy("regression", torch.zeros(2, 1))


def test_wrong_tasks_and_shapes():
    with pytest.raises(SpecError, match="Did you mean 'multiclass'"):
        task_loss("multi_class", torch.zeros(1, 2), torch.zeros(1))
    with pytest.raises(SpecError, match="one output per row"):
        task_loss("binary", torch.zeros(2, 2), torch.tensor([0, 1]))
    with pytest.raises(SpecError, match="one output per row"):
        predict("binary", torch.zeros(2, 3))
    with pytest.raises(SpecError, match="Regression outputs"):
        task_loss("regression", torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(SpecError):
        predict("ranking", torch.zeros(2, 2))
    assert task_of(1) == "binary" and task_of(2) == "multiclass"
