"""The circuit's large products on a CPU: same numbers, gradients and second gradients as the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from moe.layers.gemm import onednn_available, product
from moe.models.nac import products
from moe.models.nac.attention import attend
from moe.models.nac.circuit import build_circuit
from moe.models.nac.draws import Draws, branch, path_drop
from tests.moe.test_nac import generator, images, spec_of

pytestmark = pytest.mark.skipif(not onednn_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def everywhere(monkeypatch):
    """Everything counts as large."""
    monkeypatch.setattr(products, "LARGE", 0)


def twice(function, leaves):
    """Value, gradients, and gradients of the gradients' squares."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    first = torch.autograd.grad((y * weights).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    cheap = torch.autograd.grad((function(*leaves) * weights).sum(), leaves)
    for a, b in zip(cheap, first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return [y, *first, *(torch.zeros_like(x) if g is None else g for g, x in zip(second, leaves, strict=True))]


def same(ours, plain, leaves):
    torch.manual_seed(0)
    for a, b in zip(twice(ours, leaves), twice(plain, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("scales", [5, 1])
def test_modulated_map(scales):
    torch.manual_seed(1)
    leaves = [torch.randn(s) for s in ((3, 5, 7), (scales, 7), (4, 7), (4,))]
    same(products.modulated, lambda x, s, w, b: F.linear(x * s, w, b), leaves)


def test_linear_map_and_gated_gelu_and_probabilities():
    torch.manual_seed(1)
    same(products.linear, F.linear, [torch.randn(3, 7), torch.randn(4, 7), torch.randn(4)])
    same(products.geglu, lambda x: x[..., :4] * F.gelu(x[..., 4:]), [torch.randn(2, 3, 8)])
    same(products.log_probability, F.logsigmoid, [torch.randn(50) * 5])
    z = torch.tensor([-200.0, 0.0, 40.0], requires_grad=True)
    y = products.log_probability(z)
    y.sum().backward()
    eps = torch.finfo(torch.float32).eps
    assert y.tolist() == pytest.approx([-87.33655, -0.6931472, -eps], rel=1e-5)
    assert z.grad.tolist() == [0.0, 0.5, 0.0]


@pytest.mark.parametrize("affinity", ["none", "shared", "sampled", "closed"])
def test_attention_by_tiles(affinity):
    torch.manual_seed(1)
    leaves = [torch.randn(s) for s in ((2, 4, 6), (2, 5, 6), (2, 5, 6))]
    if affinity == "closed":
        closed = torch.zeros(4, 5).index_fill(1, torch.tensor([1, 3]), -torch.inf)
        closed[2] = -torch.inf
        assert attend(*leaves, 3, closed)[:, 2].abs().max() == 0
        leaves += [torch.randn(4, 5)]
        open_edges = closed[0]
        ours = lambda q, k, v, a: products.edge_attention(q, k, v, a + open_edges, 3)  # noqa: E731
        theirs = lambda q, k, v, a: attend(q, k, v, 3, a + open_edges)  # noqa: E731
    else:
        leaves += {"none": [], "shared": [torch.randn(4, 5)], "sampled": [torch.randn(2, 4, 5)]}[affinity]
        ours = lambda q, k, v, a=None: products.edge_attention(q, k, v, a, 3)  # noqa: E731
        theirs = lambda q, k, v, a=None: attend(q, k, v, 3, a)  # noqa: E731
    same(ours, theirs, leaves)


def test_branch_is_computed_for_the_samples_that_keep_it():
    torch.manual_seed(1)
    old, weight = torch.randn(6, 2, 3), torch.randn(3, 3)
    for u in ([0.1, 0.9, 0.25, 0.5, 0.0, 0.99], [0.9] * 6, [0.1] * 6):
        draws = Draws({"path_drop": torch.tensor(u).view(6, 1, 1)})

        def ours(x, w, draws=draws):
            kept = branch(x, 0.25, "path_drop", draws)
            return kept.add(x, kept.of(x) @ w)

        def plain(x, w, draws=draws):
            return path_drop(x, x @ w, 0.25, True, "path_drop", draws)

        same(ours, plain, [old, weight])


@pytest.mark.parametrize("training", [False, True])
def test_whole_circuit_is_the_same_with_and_without(training, monkeypatch):
    found = []
    for large in (0, 10**12):
        monkeypatch.setattr(products, "LARGE", large)
        circuit = build_circuit(spec_of(path_drop_prob=0.4), seed=3).train(training)
        parameters = dict(circuit.named_parameters())
        y = circuit(images(), Draws(generator=generator()))
        grads = torch.autograd.grad(y.square().sum(), list(parameters.values()), allow_unused=True)
        found.append(
            [y, *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters.values(), strict=True))]
        )
        assert sum(g is not None for g in grads) > 50
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_it_stays_out_of_autocast_and_transforms(everywhere):
    x = torch.randn(2, 3)
    assert products.worth_it(x, 1) and not products.worth_it(x.double(), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products.worth_it(x, 1)
    torch.func.vmap(lambda row: row if products.worth_it(row, 1) is False else pytest.fail("transformed"))(x)


def test_views_with_gaps_take_the_fast_way_too():
    a, b = torch.randn(6, 10)[:, 2:6], torch.randn(4, 9)[:, 3:8]
    torch.testing.assert_close(product(a, b), a @ b)
    torch.testing.assert_close(product(a.t(), torch.randn(6, 5)[:, :3].fill_(1.0)), a.t().sum(1, True).expand(-1, 3))
