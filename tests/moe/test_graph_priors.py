"""Graph priors, signatures fitted to them, graph regularisers, the matching behind one of them."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moe.errors import SpecError
from moe.models.nac.circuit import build_circuit
from moe.models.nac.graph_specs import GRAPH_PRESETS, KernelSpec
from moe.models.nac.kernel import DotProductKernel, cosine_distance
from moe.models.nac.matching import row_costs, transport
from moe.models.nac.presets import circuit_preset, regularizer_preset
from moe.models.nac.priors import PRIORS, graph_adjacency
from moe.models.nac.regularizers import (
    RegularizerKwargs,
    RegularizerSpec,
    block_model,
    block_model_loss,
    fit_mixture,
    graph_regularizer,
    match_rows,
    mixture_loss,
    regularizer_warnings,
    signature_hinge,
)
from moe.models.nac.signatures import fit_signatures, orthogonal_signatures, prior_signatures
from tests.moe.test_nac import spec_of

ARGUMENTS = {
    "barabasi-albert": (16, {"m": 2}),
    "scale-free": (16, {"m": 2}),
    "planted-partition": (16, {"l": 4, "k": 4, "p_in": 0.9, "p_out": 0.1}),
    "ring-of-cliques": (16, {"num_cliques": 4, "clique_size": 4}),
    "erdos-renyi": (16, {"p": 0.3}),
    "watts-strogatz": (16, {"k": 4, "p": 0.3}),
    "grid-graph": (16, {"dim": [4, 2, 2]}),
    "balanced-tree": (15, {"r": 2, "h": 3}),
    "barbell": (16, {"m1": 8}),
    "hypercube": (16, {}),
    "complete": (16, {}),
}


def random_signatures(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_every_prior_of_the_configurations_is_known():
    assert set(PRIORS) == set(GRAPH_PRESETS) == set(ARGUMENTS)


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_priors_are_plain_graphs_over_the_latents_and_follow_their_seed(name):
    count, arguments = ARGUMENTS[name]
    adjacency = graph_adjacency(name, count, arguments, seed=1)
    assert adjacency.shape == (count, count) and adjacency.dtype == torch.int64
    assert torch.equal(adjacency, adjacency.T) and not adjacency.diagonal().any()
    assert set(adjacency.unique().tolist()) == {0, 1} or name == "complete"
    assert torch.equal(adjacency, graph_adjacency(name, count, arguments, seed=1))
    assert torch.equal(adjacency, graph_adjacency(name, count, {**arguments, "seed": 1}, seed=2))
    if PRIORS[name].seeded:
        assert not torch.equal(adjacency, graph_adjacency(name, count, arguments, seed=2))


def test_shapes_of_some_priors():
    ring = graph_adjacency("ring-of-cliques", 12, {"num_cliques": 3, "clique_size": 4})
    assert int(ring.sum()) == 2 * (3 * 6 + 3)
    assert graph_adjacency("hypercube", 256).shape == (256, 256)
    assert (graph_adjacency("hypercube", 256).sum(0) == 8).all() and len(graph_adjacency("hypercube", 100)) == 256
    assert int(graph_adjacency("complete", 5).sum()) == 20
    assert int(graph_adjacency("barbell", 8, {"m1": 4}).sum()) == 2 * (6 + 6 + 1)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("small-world", {}, "There is no graph prior named 'small-world'"),
        ("erdos-renyi", {}, r"missing: \['p'\]"),
        ("erdos-renyi", {"p": 0.1, "q": 1}, r"unknown: \['q'\]"),
        ("barabasi-albert", {"m": 20}, "networkx cannot make the graph prior 'barabasi-albert'"),
        ("balanced-tree", {"r": "two", "h": 2}, "networkx cannot make"),
    ],
)
def test_wrong_priors_are_refused(name, arguments, message):
    with pytest.raises(SpecError, match=message):
        graph_adjacency(name, 10, arguments)


def test_a_prior_must_have_as_many_nodes_as_latents():
    with pytest.raises(SpecError, match="12 nodes for 10 latents"):
        prior_signatures("ring-of-cliques", 10, 8, {"num_cliques": 3, "clique_size": 4})
    with pytest.raises(SpecError, match="12 nodes for 6 latents"):
        build_circuit(
            spec_of(
                mediator_latent_kwargs={
                    "graph_preset": "ring-of-cliques",
                    "graph_generator_kwargs": {"num_cliques": 3, "clique_size": 4},
                }
            )
        )


def test_fitted_signatures_render_their_graph():
    kwargs = {"num_cliques": 4, "clique_size": 4, "num_iters": 250, "learning_rate": 1e-2}
    fit = prior_signatures("ring-of-cliques", 16, 16, kwargs, seed=2)
    near = cosine_distance(fit.signatures, fit.signatures) < 0.8
    assert fit.score < 0.02 and torch.equal(near.long() - torch.eye(16, dtype=torch.long), fit.adjacency)
    same = prior_signatures("ring-of-cliques", 16, 16, kwargs, seed=2)
    assert torch.equal(fit.signatures, same.signatures)
    start = orthogonal_signatures(16, 16, 2)
    torch.testing.assert_close(start @ start.T, torch.eye(16), atol=1e-5, rtol=0)
    assert fit_signatures(fit.adjacency, start, num_iters=0).score > fit.score


def test_path_fit_draws_neighbours_nearer_than_strangers():
    path = torch.diag(torch.ones(7, dtype=torch.int64), 1)
    path = path + path.T
    start = orthogonal_signatures(8, 8, 0)
    fit = fit_signatures(path, start, loss="mse", num_iters=300, learning_rate=1e-2)
    d = cosine_distance(fit.signatures, fit.signatures)
    assert fit.score < 0.3 * fit_signatures(path, start, loss="mse", num_iters=0).score
    assert d[0, 1] < d[0, 4] < d[0, 7] + 0.2
    empty = fit_signatures(torch.zeros(3, 3, dtype=torch.int64), torch.eye(3), loss="mse", num_iters=1)
    assert torch.isfinite(empty.signatures).all()


def test_complete_prior_makes_all_signatures_equal():
    fit = prior_signatures("complete", 5, 7)
    assert (fit.signatures == fit.signatures[:1]).all() and fit.score == 0


def test_fit_refuses_what_does_not_fit():
    with pytest.raises(SpecError, match=r"\(4, 4\) and signatures of \(5, 2\)"):
        fit_signatures(torch.zeros(4, 4), torch.zeros(5, 2))
    with pytest.raises(SpecError, match="no signature loss named 'l1'"):
        fit_signatures(torch.zeros(4, 4), torch.ones(4, 2), loss="l1")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_hinge_pushes_near_pairs_apart(reduction):
    signatures = random_signatures(9, 3).requires_grad_()
    pairs = [(i, j) for i in range(9) for j in range(i)]
    distances = [1 - F.cosine_similarity(signatures[i], signatures[j], dim=0) for i, j in pairs]
    near = torch.stack([d for d in distances if d < 0.4])
    loss = signature_hinge(signatures, 0.4, reduction)
    torch.testing.assert_close(loss, -getattr(near, reduction)())
    (gradient,) = torch.autograd.grad(loss, signatures)
    moved = (signatures - 0.01 * gradient).detach()
    assert signature_hinge(moved, 0.4, "sum") < signature_hinge(signatures, 0.4, "sum") or len(near) == 0
    apart = torch.eye(3, requires_grad=True)
    assert signature_hinge(apart, 0.4, reduction) == 0
    assert torch.equal(torch.autograd.grad(signature_hinge(apart, 0.4, reduction), apart)[0], torch.zeros(3, 3))


@settings(max_examples=60, deadline=None)
@given(
    clusters=st.integers(1, 6),
    size=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
)
def test_transport_is_as_cheap_as_an_assignment(clusters, size, seed, ties):
    random = np.random.default_rng(seed)
    cost = (
        random.integers(0, 4, (clusters, clusters * size)).astype(float)
        if ties
        else random.normal(size=(clusters, clusters * size))
    )
    cluster = transport(cost)
    assert np.bincount(cluster, minlength=clusters).tolist() == [size] * clusters
    ours = cost[cluster, np.arange(clusters * size)].sum()
    every = np.repeat(cost, size, axis=0)
    assert ours == pytest.approx(every[linear_sum_assignment(every)].sum(), abs=1e-9)


def test_matching_equals_the_official_form_on_kernels():
    signatures = random_signatures(48, 4)
    kernel = DotProductKernel(KernelSpec(truncation=0.9))
    affinities = kernel(signatures, signatures).detach()
    target = block_model(48, 6, 0.9, 0.2)
    cost = (target.unsqueeze(1) - affinities.unsqueeze(0)).square().mean(-1)
    np.testing.assert_allclose(
        np.repeat(row_costs(target[::8].double().numpy(), affinities.double().numpy()), 8, 0), cost, atol=1e-6
    )
    rows = match_rows(target, affinities, 6)
    assert sorted(rows.tolist()) == list(range(48))
    official = affinities[torch.from_numpy(linear_sum_assignment(cost.numpy())[1])]
    torch.testing.assert_close((affinities[rows] - target).square().mean(), (official - target).square().mean())


def test_matching_is_fast_at_full_size():
    affinities = torch.rand(768, 768, generator=torch.Generator().manual_seed(0))
    begin = time.process_time()
    match_rows(block_model(768, 12, 0.9, 0.2), affinities, 12)
    assert time.process_time() - begin < 2


def test_matching_refuses_unequal_clusters_and_diverged_values():
    with pytest.raises(SpecError, match="10 latents cannot form 4 clusters"):
        block_model_loss(random_signatures(10, 3), [torch.tensor(1.0)], num_clusters=4)
    with pytest.raises(SpecError, match="not all finite"):
        block_model_loss(torch.full((4, 3), torch.nan), [torch.tensor(1.0)], num_clusters=2)
    with pytest.raises(SpecError, match="7 nodes cannot"):
        transport(np.zeros((2, 7)))


def test_block_model_loss_counts_kernels_and_clips():
    signatures = random_signatures(8, 3).requires_grad_()
    fixed = torch.tensor(1.0)
    one = block_model_loss(signatures, [fixed], num_clusters=4)
    torch.testing.assert_close(block_model_loss(signatures, [fixed, fixed.clone()], num_clusters=4), one)
    torch.testing.assert_close(
        block_model_loss(signatures, [fixed.clone().requires_grad_() for _ in range(2)], num_clusters=4), 2 * one
    )
    other = block_model_loss(signatures, [fixed, torch.tensor(2.0)], num_clusters=4)
    assert other > one
    assert block_model_loss(signatures, [fixed], num_clusters=4, clip=4.0).item() == 4.0
    assert torch.autograd.grad(one, signatures)[0].any()
    assert float(block_model_loss(signatures, [], num_clusters=4)) == 0


def test_training_on_the_block_model_finds_clusters():
    signatures = random_signatures(16, 8, 3).requires_grad_()
    optimizer = torch.optim.Adam([signatures], lr=0.03)
    bandwidth = [torch.tensor(1.0)]
    start = block_model_loss(signatures, bandwidth, num_clusters=4).item()
    for _ in range(100):
        optimizer.zero_grad()
        block_model_loss(signatures, bandwidth, num_clusters=4).backward()
        optimizer.step()
    assert block_model_loss(signatures, bandwidth, num_clusters=4) < 0.5 * start


def test_mixture_is_fitted_and_scores_its_own_distances_best():
    signatures = torch.cat([random_signatures(6, 8, 0) * 0.1 + torch.eye(8)[k] for k in range(2)])
    weights, means, sigmas = fit_mixture(signatures, 2, seed=0)
    assert float(weights.sum()) == pytest.approx(1) and (sigmas > 0).all()
    fitted = mixture_loss(signatures, weights, means, sigmas)
    assert fitted < mixture_loss(signatures, weights, means + 0.3, sigmas)
    torch.testing.assert_close(mixture_loss(signatures, 3 * weights, means, sigmas), fitted)
    torch.testing.assert_close(mixture_loss(signatures, weights, means, sigmas, "sum"), 66 * fitted)
    with pytest.raises(SpecError, match="1 pairs of latents are too few"):
        fit_mixture(signatures[:2], 3)


def test_regularisers_of_a_circuit():
    circuit = build_circuit(spec_of(), seed=0)
    together = torch.cat(list(circuit.signatures().values()))
    assert len(together) == 12 and len(circuit.bandwidths()) == 2
    hinge = graph_regularizer(circuit, RegularizerSpec(hinge=0.6))
    torch.testing.assert_close(hinge, signature_hinge(together, 0.6))
    kind = "stochastic_block_model_regularization"
    own = RegularizerSpec(type=kind, kwargs=RegularizerKwargs(num_clusters=3))
    expected = block_model_loss(circuit.signatures()["mediator"], circuit.bandwidths(), num_clusters=3)
    torch.testing.assert_close(graph_regularizer(circuit, own), expected)
    all_three = RegularizerKwargs(num_clusters=4, regularize_input_latents=True, regularize_output_latents=True)
    graph_regularizer(circuit, RegularizerSpec(type=kind, kwargs=all_three)).backward()
    assert all(s.grad.any() for s in circuit.signatures().values())
    assert all(b.grad is not None for b in circuit.bandwidths())
    assert float(graph_regularizer(circuit, RegularizerSpec(use=False))) == 0
    mixture = RegularizerSpec(type="signature_distribution_regularization")
    fitted = fit_mixture(together, 2)
    torch.testing.assert_close(graph_regularizer(circuit, mixture, fitted), mixture_loss(together, *fitted))
    with pytest.raises(SpecError, match="needs its mixture"):
        graph_regularizer(circuit, mixture)
    with pytest.raises(SpecError, match="regularises no latents"):
        nobody = RegularizerKwargs(regularize_mediator_latents=False)
        graph_regularizer(circuit, RegularizerSpec(type=kind, kwargs=nobody))


def test_clusters_that_differ_from_the_prior_are_reported():
    official = regularizer_preset("planted")
    (text,) = regularizer_warnings(circuit_preset("imagenet", "planted"), official)
    assert "12 groups" in text and "8 clusters" in text
    assert not regularizer_warnings(circuit_preset("tiny_imagenet", "planted"), official)
    assert not regularizer_warnings(circuit_preset("imagenet", "ring"), regularizer_preset("ring"))
