"""Gates: the formulas, float32 under autocast, derivatives, and the avg-k gate that follows the experts' keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from moe.errors import SpecError
from moe.layers.gates import CosineGate, LinearGate, NoisyGate, build_gate, key_means, updated_gate
from moe.router_spec import RouterSpec

D, E = 6, 4


def tokens(n=5, dtype=torch.float64, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gates(dtype=torch.float64):
    torch.manual_seed(0)
    noisy = NoisyGate(D, E)
    for weight in noisy.parameters():
        torch.nn.init.normal_(weight)
    found = {
        "linear": LinearGate(D, E),
        "normalized": LinearGate(D, E, normalize_input=True),
        "bias": LinearGate(D, E, bias=True),
        "cosine": CosineGate(D, E, projection=5),
        "noisy": noisy,
    }
    return {name: gate.to(dtype) for name, gate in found.items()}


KINDS = sorted(gates())


def test_linear_gates():
    x, found = tokens(), gates()
    plain, unit, biased = found["linear"], found["normalized"], found["bias"]
    torch.testing.assert_close(plain(x), x @ plain.weight.T)
    torch.testing.assert_close(unit(x), F.normalize(x, dim=1) @ unit.weight.T)
    torch.testing.assert_close(unit(x), unit(x * 7))
    torch.testing.assert_close(biased(x), x @ biased.weight.T + biased.bias)
    assert [name for name, _ in plain.named_parameters()] == ["weight"]


def test_cosine_gate_is_a_scaled_cosine():
    gate, x = gates()["cosine"], tokens()
    cosines = F.cosine_similarity(gate.projector(x).unsqueeze(2), gate.sim_matrix.unsqueeze(0), dim=1)
    torch.testing.assert_close(gate(x), 2.0 * cosines)  # temperature 0.5 at the start
    assert float(gate(x).detach().abs().max()) <= 2.0
    assert sorted(gate.state_dict()) == ["projector.bias", "projector.weight", "sim_matrix", "temperature"]


@pytest.mark.parametrize("above", [True, False])
def test_scale_stops_at_its_maximum_and_so_does_its_gradient(above):
    gate, x = gates()["cosine"], tokens()
    with torch.no_grad():
        gate.temperature.fill_(math.log(100.0) + (0.1 if above else -0.1))
    gate(x).square().sum().backward()
    assert (float(gate.temperature.grad) == 0.0) is above
    cosines = F.cosine_similarity(gate.projector(x).unsqueeze(2), gate.sim_matrix.unsqueeze(0), dim=1)
    torch.testing.assert_close(gate(x), (100.0 if above else 100.0 * math.exp(-0.1)) * cosines)


def test_noisy_gate_starts_undecided_with_a_positive_deviation():
    gate, x = NoisyGate(D, E, noise_epsilon=0.25), tokens(dtype=torch.float32)
    assert torch.equal(gate(x), torch.zeros(5, E))
    torch.testing.assert_close(gate.deviation(x), torch.full((5, E), math.log(2.0) + 0.25))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given_type", [torch.bfloat16, torch.float32])
def test_float32_under_autocast_and_for_narrow_tokens(kind, given_type):
    gate, x = gates(torch.float32)[kind], tokens(dtype=torch.float32).to(given_type)
    expected = gate(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate(x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    narrow = gates(torch.float32)[kind].to(torch.bfloat16)
    assert narrow(x.to(torch.bfloat16)).dtype == torch.float32
    assert gates()[kind](x.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["first", "second"])
def test_derivatives_against_finite_differences(kind, order):
    gate, x = gates()[kind], tokens(3).requires_grad_()
    names = [name for name, _ in gate.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in gate.parameters()]

    def function(x, *values):
        return functional_call(gate, dict(zip(names, values, strict=True)), (x,))

    check = torch.autograd.gradcheck if order == "first" else torch.autograd.gradgradcheck
    assert check(function, (x, *values))


def test_second_order_at_a_token_that_projects_to_zero():
    gate = gates()["cosine"]
    torch.nn.init.zeros_(gate.projector.bias)
    x = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(gate(x).sum(), [x, *gate.parameters()], create_graph=True)
    sum(g.square().sum() for g in first).backward()
    assert all(torch.isfinite(t).all() for t in (gate(x), *first, *(p.grad for p in gate.parameters())))


@pytest.mark.parametrize(
    "spec, kind, parameters",
    [
        (RouterSpec(), LinearGate, ["weight"]),
        (RouterSpec(gate="avg_k", one_score=True, normalize_input=True), LinearGate, ["weight"]),
        (RouterSpec(gate="naive", top_k=2), LinearGate, ["weight", "bias"]),
        (RouterSpec(gate="gshard", top_k=2), LinearGate, ["weight", "bias"]),
        (RouterSpec(gate="switch"), LinearGate, ["weight", "bias"]),
        (RouterSpec(gate="noisy", noise_epsilon=0.5), NoisyGate, ["w_gate", "w_noise"]),
        (RouterSpec(gate="cosine", projection=7), CosineGate, None),
    ],
    ids=lambda value: getattr(value, "gate", ""),
)
def test_build_gate(spec, kind, parameters):
    gate = build_gate(spec, D, E)
    assert type(gate) is kind and gate(tokens(dtype=torch.float32)).shape == (5, E)
    if parameters is not None:
        assert [name for name, _ in gate.named_parameters()] == parameters
    assert all(p.requires_grad is (spec.gate != "avg_k") for p in gate.parameters())
    assert getattr(gate, "normalize_input", False) is spec.normalize_input
    if kind is CosineGate:
        assert gate.sim_matrix.shape == (7, E) and float(gate.temperature.detach()) == pytest.approx(math.log(2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_mean_key_logit_is_the_mean_pre_activation(experts, hidden, seed):
    w1 = torch.randn(experts, hidden, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = tokens()
    torch.testing.assert_close(x @ key_means(w1).T, torch.einsum("nd,ehd->neh", x, w1).mean(-1))


def test_value_norms_weigh_the_keys():
    w1 = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    w2 = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])  # values of norm 3 and 1
    torch.testing.assert_close(key_means(w1, w2), torch.tensor([[0.75, 0.25]]))
    unit = key_means(w1, w2, normalize=True)
    torch.testing.assert_close(unit, F.normalize(torch.tensor([[0.75, 0.25]]), dim=1))


def test_updated_gate_remembers():
    w1, gate = torch.randn(E, 3, D), torch.randn(E, D)
    torch.testing.assert_close(updated_gate(gate, w1), w1.mean(1))
    torch.testing.assert_close(updated_gate(gate, w1, momentum=1.0), gate)
    torch.testing.assert_close(updated_gate(gate, w1, momentum=0.9), 0.9 * gate + 0.1 * w1.mean(1))


def test_gates_that_do_not_fit_their_keys_are_refused():
    w1 = torch.randn(E, 3, D)
    with pytest.raises(SpecError, match=r"momentum is 1\.5"):
        updated_gate(torch.randn(E, D), w1, momentum=1.5)
    with pytest.raises(SpecError, match=r"\(3, 6\) cannot follow keys \(4, 3, 6\)"):
        updated_gate(torch.randn(3, D), w1)
    with pytest.raises(SpecError, match=r"\(4, 3, 6\).*\[E, D, H\] = \(4, 6, 3\)"):
        key_means(w1, torch.randn(E, 3, D))
