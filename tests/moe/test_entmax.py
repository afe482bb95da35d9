"""Entmax 1.5 against an exact solution, its derivatives, and what it must keep for any scores."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import SpecError
from moe.layers import entmax
from moe.layers.entmax import entmax15


def exact(x):
    """Bisection in float64: slow, with no idea in common with Newton's method."""
    z = (x.double() - x.double().amax(-1, keepdim=True)) / 2
    low, high = torch.full_like(z[..., :1], -1.0), torch.zeros_like(z[..., :1])
    for _ in range(80):
        middle = (low + high) / 2
        left = (z - middle).clamp_min(0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return (z - low).clamp_min(0).square()


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=40),
        elements=st.floats(-1e5, 1e5, width=32) | st.floats(-3, 3, width=32) | st.integers(-2, 2),
    )
)
def test_any_scores_within_1e_6_of_the_exact_solution(values):
    x = torch.from_numpy(values)
    p = entmax15(x)
    assert (p.double() - exact(x)).abs().max() < 1e-6
    assert (p >= 0).all() and (p.sum(-1) - 1).abs().max() < 1e-5
    # Larger scores never get less, and equal ones get the same.
    order = x.argsort(-1)
    assert (p.gather(-1, order).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 513, 20000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_long_rows_and_both_types(n, spread):
    x = torch.randn(7, n, generator=torch.Generator().manual_seed(n)) * spread
    assert (entmax15(x).double() - exact(x)).abs().max() < 1e-6
    assert (entmax15(x.double()) - exact(x)).abs().max() < 1e-13


def test_pieces_and_the_whole_agree(monkeypatch):
    x = torch.randn(5, 30, 11)
    whole = entmax15(x)
    monkeypatch.setattr(entmax, "_CHUNK", 64)
    torch.testing.assert_close(entmax15(x), whole, rtol=0, atol=0)


def test_derivatives_of_first_and_second_order_in_float64():
    x = (torch.randn(3, 4, 7, dtype=torch.float64) * 2).requires_grad_()
    assert (entmax15(x) == 0).any()
    assert torch.autograd.gradcheck(entmax15, x)
    assert torch.autograd.gradgradcheck(entmax15, x)
    assert torch.autograd.gradcheck(lambda v: entmax15(v, dim=1), x)


def test_dominant_tied_and_masked_entries():
    inf = float("inf")
    x = torch.tensor([[0.0, 9.0, 0.0], [2.0, 2.0, 2.0], [1.0, -inf, 1.0]], requires_grad=True)
    p = entmax15(x)
    torch.testing.assert_close(p, torch.tensor([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.0, 0.5]]))
    p[:, 0].sum().backward()
    assert x.grad.isfinite().all() and x.grad[2, 1] == 0
    assert entmax15(torch.full((2, 3), -inf)).isnan().all()


def test_low_precision_is_computed_in_float32():
    x = torch.randn(4, 50).bfloat16()
    p = entmax15(x)
    assert p.dtype == torch.bfloat16
    torch.testing.assert_close(p, entmax15(x.float()).bfloat16())


def test_transforms_of_functions():
    x = torch.randn(6, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(entmax15, in_dims=1)(x), entmax15(x.transpose(0, 1)))
    weights = torch.randn(9, dtype=torch.float64)
    gradient = torch.func.vmap(torch.func.grad(lambda row: (entmax15(row) * weights).sum()))(x[0])
    leaf = x[0].clone().requires_grad_()
    (entmax15(leaf) * weights).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("x", [torch.zeros(3, 0), torch.tensor(1.0), torch.zeros(2, 3, dtype=torch.int64)])
def test_scores_that_make_no_sense(x):
    with pytest.raises(SpecError, match="entmax15 needs"):
        entmax15(x)
