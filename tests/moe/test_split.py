"""Splitting a dense layer into experts and merging it back: optimal, balanced, exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moe.conversion.balanced import assign, balanced_kmeans, inertia
from moe.conversion.coactivation import coactivation_graph, partition_graph, rebalance
from moe.conversion.merge import bias_remainder, merge_experts
from moe.conversion.modularity import ROUTES, route_quality, sparsity
from moe.conversion.split import (
    SPLITS,
    DenseFFN,
    check_labels,
    gather_experts,
    split_digest,
    split_keys,
    split_objective,
)
from moe.errors import SpecError

FEW = settings(max_examples=25, deadline=None)


def random_ffn(neurons=24, width=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((neurons, width), (neurons,), (width, neurons), (width,))
    return DenseFFN(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


def planted(groups=6, size=5, width=16, spread=0.05, seed=0):
    stream = np.random.RandomState(seed)
    centers = stream.randn(groups, width)
    labels = stream.permutation(np.repeat(np.arange(groups), size))
    return centers[labels] + spread * stream.randn(groups * size, width), labels


@FEW
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_equal_assignment_is_optimal(groups, size, width, seed):
    stream = np.random.RandomState(seed)
    # A coarse grid makes ties and empty groups common.
    points, centers = stream.randint(0, 4, (groups * size, width)), stream.randint(0, 4, (groups, width))
    labels, cost = assign(points, centers, size, size)
    assert (np.bincount(labels, minlength=groups) == size).all()
    distance = np.rint(1000 * np.linalg.norm(points[:, None] - centers, axis=2))
    rows, columns = linear_sum_assignment(np.repeat(distance, size, axis=1))
    assert cost == distance[np.arange(len(points)), labels].sum() == distance[rows, columns // size].sum()


@FEW
@given(st.integers(2, 5), st.integers(0, 3), st.integers(1, 3), st.integers(0, 1000))
def test_assignment_between_limits(groups, low, more, seed):
    stream = np.random.RandomState(seed)
    count = int(stream.randint(groups * low, groups * (low + more) + 1)) or 1
    points, centers = stream.randn(count, 3), stream.randn(groups, 3)
    labels, cost = assign(points, centers, low, low + more)
    sizes = np.bincount(labels, minlength=groups)
    assert sizes.min() >= low and sizes.max() <= low + more
    free = np.rint(1000 * np.linalg.norm(points[:, None] - centers, axis=2))
    assert cost >= free.min(axis=1).sum()
    if low == 0 and more >= count:
        assert cost == free.min(axis=1).sum()


def test_impossible_assignments_are_refused():
    with pytest.raises(SpecError, match="7 points cannot fill 3 groups of 3 to 4"):
        assign(np.zeros((7, 2)), np.zeros((3, 2)), 3, 4)
    with pytest.raises(SpecError, match="not finite"):
        assign(np.full((2, 2), np.nan), np.zeros((2, 2)), 1, 1)


def test_kmeans_finds_planted_groups_and_is_deterministic():
    points, labels = planted()
    found = balanced_kmeans(points, 6)
    pairs = {(int(a), int(b)) for a, b in zip(found.labels_N, labels, strict=True)}
    assert len(pairs) == 6
    assert found.inertia == pytest.approx(inertia(points, labels))
    assert np.array_equal(found.labels_N, balanced_kmeans(points, 6).labels_N)


def test_more_starts_are_never_worse():
    points = np.random.RandomState(0).randn(96, 8)
    values = [balanced_kmeans(points, 8, restarts=n).inertia for n in (1, 3, 10)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("method", SPLITS)
def test_every_split_is_equal_and_repeatable(method):
    dense = random_ffn(48, 8)
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    labels = split_keys(dense.keys_FD, 6, method, hidden_TD=hidden)
    check_labels(labels, 48, 6)
    assert torch.equal(labels, split_keys(dense.keys_FD, 6, method, hidden_TD=hidden))
    other = split_keys(dense.keys_FD, 6, method, hidden_TD=hidden, seed=1)
    assert method != "random" or not torch.equal(labels, other)


def test_balanced_split_beats_the_random_one():
    keys = torch.from_numpy(planted(8, 6, spread=0.5)[0])
    objective = {m: split_objective(keys, split_keys(keys, 8, m)) for m in ("balanced", "contiguous", "random")}
    assert objective["balanced"] < 0.6 * min(objective["contiguous"], objective["random"])


def test_scale_of_a_key_does_not_matter():
    keys = random_ffn(24, 6).keys_FD
    scaled = keys * torch.linspace(0.1, 9, 24).unsqueeze(1)
    assert torch.equal(split_keys(keys, 4), split_keys(scaled, 4))


def test_bad_splits_are_refused():
    keys = random_ffn(24, 6).keys_FD
    with pytest.raises(SpecError, match=r"24 neurons cannot be split into 7 equal experts.*6, 8"):
        split_keys(keys, 7)
    with pytest.raises(SpecError, match="Did you mean 'balanced'"):
        split_keys(keys, 4, "balance")
    with pytest.raises(SpecError, match="not finite"):
        split_keys(keys.clone().index_fill_(0, torch.tensor([3]), float("inf")), 4)
    with pytest.raises(SpecError, match="inputs of the layer"):
        split_keys(keys, 4, "coactivation")
    with pytest.raises(SpecError, match=r"values_DF has shape \(24, 6\), expected \(6, 24\)"):
        DenseFFN(keys, torch.zeros(24), keys, torch.zeros(6))
    with pytest.raises(SpecError, match="11 to 13 neurons"):
        check_labels(torch.tensor([0] * 13 + [1] * 11), 24, 2)
    with pytest.raises(SpecError, match="run from 0 to 2"):
        check_labels(torch.tensor([0] * 12 + [2] * 12), 24, 2)


def test_digest_knows_the_weights_and_the_settings():
    keys = random_ffn().keys_FD
    digests = {
        split_digest(keys, 4),
        split_digest(keys, 6),
        split_digest(keys, 4, seed=1),
        split_digest(keys, 4, "random"),
        split_digest(keys + 1e-3, 4),
        split_digest(keys.bfloat16(), 4),
    }
    assert len(digests) == 6 and split_digest(keys.clone(), 4) in digests


@FEW
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 7), st.integers(0, 1000))
def test_split_and_merge_are_bit_equal(experts, size, width, top_k, seed):
    dense = random_ffn(experts * size, width, seed)
    labels = split_keys(dense.keys_FD, experts, "random", seed=seed)
    top_k = min(top_k, experts)
    cut = gather_experts(dense, labels, experts, top_k)
    merged = merge_experts(cut, labels, top_k, remainder_D=bias_remainder(dense.bias_D, top_k))
    assert merged.bias_spread == 0 and merged.replica_spread == 0
    for name in ("keys_FD", "bias_F", "values_DF", "bias_D"):
        assert torch.equal(getattr(merged.dense, name), getattr(dense, name)), name


def test_repeated_experts_and_copies():
    dense = random_ffn(12, 4)
    labels = split_keys(dense.keys_FD, 4, "random")
    cut = gather_experts(dense, labels, 4, 2, repeat=3)
    assert cut.fc1_EsD.shape == (4, 9, 4)
    assert torch.equal(merge_experts(cut, labels, 2, repeat=3).dense.keys_FD, dense.keys_FD)
    drifted = cut._replace(fc1_EsD=cut.fc1_EsD + torch.arange(4.0).view(4, 1, 1))
    with pytest.raises(SpecError, match="differ by up to"):
        merge_experts(drifted, labels, 2, repeat=3)
    assert merge_experts(drifted, labels, 2, repeat=3, average_replicas=True).replica_spread > 0
    whole = gather_experts(dense, labels, 3, 2, copy=True)
    assert whole.fc1_EsD.shape == (3, 12, 4) and torch.equal(whole.bias_ED[2], dense.bias_D)
    with pytest.raises(SpecError, match="12 neurons, the labels give each 4"):
        merge_experts(whole, split_keys(dense.keys_FD, 3, "contiguous"), 2)


def test_trained_output_biases_merge_to_their_weighted_mean():
    dense = random_ffn(8, 3)
    labels = split_keys(dense.keys_FD, 4, "contiguous")
    cut = gather_experts(dense, labels, 4, 2)
    moved = cut._replace(bias_ED=cut.bias_ED + torch.tensor([0.0, 0.0, 0.0, 4.0]).unsqueeze(1))
    even = merge_experts(moved, labels, 2)
    assert torch.allclose(even.dense.bias_D, dense.bias_D + 2) and even.bias_spread == pytest.approx(3)
    counted = merge_experts(moved, labels, 2, counts_E=torch.tensor([5, 5, 5, 0]))
    assert torch.allclose(counted.dense.bias_D, dense.bias_D, atol=1e-6)


def test_graph_counts_batches_in_which_both_fire():
    keys = torch.eye(3)
    together, alone = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    hidden = torch.cat([together.repeat(24, 1), alone.repeat(16, 1), torch.ones(3, 3)])
    edges = coactivation_graph(keys, hidden)
    # Counts 3 (three batches of both), 2 and zeros; the first non-zero percentile is the 40th, 0.4: floor(3 / 0.396).
    assert edges.tolist() == [[0, 7, 0], [7, 0, 0], [0, 0, 0]]
    with pytest.raises(SpecError, match="7 tokens do not fill one batch of 8"):
        coactivation_graph(keys, hidden[:7])
    assert coactivation_graph(keys, -hidden[:24]).sum() == 0


def test_partition_keeps_cliques_together():
    edges = torch.block_diag(*[torch.full((6, 6), 9)] * 3).fill_diagonal_(0)
    edges[0, 6] = edges[6, 0] = 1
    labels = partition_graph(edges, 3)
    assert all(len(set(labels[i : i + 6].tolist())) == 1 for i in (0, 6, 12)) and len(set(labels.tolist())) == 3
    assert partition_graph(edges, 1).sum() == 0


@FEW
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_rebalancing_moves_only_the_surplus(groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randint(0, groups, (groups * size,), generator=generator)
    after = rebalance(before, groups, generator)
    sizes = torch.bincount(before, minlength=groups)
    assert (torch.bincount(after, minlength=groups) == size).all()
    assert int((before != after).sum()) == int((sizes - size).clamp_min(0).sum())
    assert not bool(((sizes <= size)[before] & (before != after)).any())


def test_route_quality_at_its_ends():
    dense, x = random_ffn(32, 8), torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    labels = split_keys(dense.keys_FD, 8)
    for route in ROUTES:
        every = route_quality(dense, labels, x, 8, 8, route)
        assert (every.capture, every.overlap, every.error) == pytest.approx((1, 1, 0), abs=1e-5)
    found = {route: route_quality(dense, labels, x, 8, 2, route) for route in ROUTES}
    assert found["best"].overlap == 1
    assert found["best"].capture > found["avg_k"].capture > found["random"].capture > found["bottom"].capture
    assert found["fixed"].load_max == 4
    assert 0 < sparsity(dense, x).firing < 1 and sparsity(dense, x).top_tenth < 1
    with pytest.raises(SpecError, match="no route"):
        route_quality(dense, labels, x, 8, 2, "worst")
