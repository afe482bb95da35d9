"""Co-activation graphs: partitioners, part probabilities, lists made of parts."""

import sys

import networkx
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx, importorskip, mark, raises

from moe.conversion.recycle.graph import modularity, part_probabilities, partition
from moe.conversion.recycle.indices import ListPlan, graph_lists
from moe.conversion.recycle.indices_v2 import NeuronPlan, neuron_lists
from moe.conversion.recycle.options import GraphOptions, RecycleOptions
from moe.conversion.recycle.recycle import recycle
from moe.errors import DataError, EnvironmentProblem, SpecError
from tests.moe.recycle_helpers import dense_state, record, seeded, successor_state

few = settings(max_examples=20, deadline=None)


def planted(groups=4, size=8, seed=0, inside=20, noise=4):
    """Counts of neurons that fire in groups; and the groups."""
    draws = np.random.default_rng(seed)
    labels = draws.permutation(np.repeat(np.arange(groups), size))
    counts = draws.integers(1, noise, (len(labels), len(labels))) + inside * (labels[:, None] == labels)
    upper = np.triu(counts, 1)
    return torch.from_numpy((upper + upper.T).astype(np.float32)), torch.from_numpy(labels)


def same_parts(a, b):
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


@mark.parametrize(
    "options",
    [
        GraphOptions(method="metis", parts=4, weights="truncated"),
        GraphOptions(method="metis", parts=4, weights="scaled"),
        GraphOptions(method="louvain"),
        GraphOptions(method="spectral", parts=4, trials=10),
    ],
    ids=lambda o: f"{o.method}-{o.weights}",
)
def test_planted_groups_are_found(options):
    if options.method == "metis":
        importorskip("pymetis")
    co_act, groups = planted()
    labels = partition(co_act, options)
    assert same_parts(labels, groups)
    assert labels.dtype == torch.int64 and torch.equal(labels, partition(co_act, options))
    firsts = [int((labels == part).nonzero()[0]) for part in range(4)]
    assert firsts == sorted(firsts)


def test_unweighted_metis_does_not_see_the_weights():
    importorskip("pymetis")
    co_act, groups = planted()
    blind = partition(co_act, GraphOptions(parts=4))
    assert torch.equal(blind, partition((co_act > 0).float(), GraphOptions(parts=4)))
    assert modularity(co_act, blind) < modularity(co_act, groups)


@few
@given(st.integers(0, 999), st.integers(1, 5))
def test_probabilities_and_modularity_equal_plain_sums(seed, parts):
    co_act, _ = planted(3, 5, seed)
    labels = torch.randint(0, parts, (15,), generator=seeded(seed)) * 7
    ids, sizes, prob = part_probabilities(co_act + torch.eye(15), labels)
    inner = [
        sum(float(co_act[i, j]) for i in range(15) for j in range(15) if i != j and labels[i] == labels[j] == part)
        for part in ids.tolist()
    ]
    assert ids.tolist() == list(dict.fromkeys(labels.tolist()))
    assert sizes.tolist() == [int((labels == part).sum()) for part in ids]
    assert prob.tolist() == approx([w / max(sum(inner), 1e-9) for w in inner])
    graph = networkx.from_numpy_array(co_act.numpy())
    sets = [{i for i in range(15) if labels[i] == part} for part in ids]
    assert modularity(co_act, labels) == approx(networkx.community.modularity(graph, sets))


@few
@given(st.integers(0, 999), st.permutations(range(15)))
def test_probabilities_follow_a_permutation(seed, order):
    co_act, labels = planted(3, 5, seed)
    order = list(order)
    plain = dict(
        zip(part_probabilities(co_act, labels)[0].tolist(), part_probabilities(co_act, labels)[2], strict=True)
    )
    ids, _, prob = part_probabilities(co_act[order][:, order], labels[order])
    assert [float(plain[i]) for i in ids.tolist()] == approx(prob.tolist())
    assert modularity(co_act, labels) == approx(modularity(co_act[order][:, order], labels[order]))


@few
@given(st.integers(0, 999), st.sampled_from((1.0, 1.05, 1.1)))
def test_louvain_is_about_as_good_as_networkx(seed, resolution):
    co_act, _ = planted(3, 6, seed, inside=3)
    graph = networkx.from_numpy_array(co_act.numpy())
    labels = partition(co_act, GraphOptions(method="louvain", resolution=resolution))
    sets = [{i for i in range(18) if labels[i] == part} for part in labels.unique()]
    theirs = networkx.community.louvain_communities(graph, resolution=resolution, seed=42)
    quality = networkx.community.modularity
    assert quality(graph, sets, resolution=resolution) >= quality(graph, theirs, resolution=resolution) - 0.03


def test_lists_join_whole_parts_and_go_on_when_they_are_short():
    co_act, groups = planted(8, 4)
    plan = ListPlan(32, 16, 2, (1,), 6, shared=True)
    lists, probabilities = graph_lists(plan, {1: co_act}, seeded(), lambda _: groups, clusters=8)
    assert lists[1].shape == (6, 16) and lists[0].shape == (16,) and len(probabilities) == 2
    for row in lists[1]:
        members = np.bincount(groups[row].numpy(), minlength=8)
        assert sorted(members)[-4:] == [4, 4, 4, 4]  # four whole parts: 5 were drawn, 16 units kept
    long = ListPlan(32, 30, 2, (1,), 6)
    full, _ = graph_lists(long, {1: co_act}, seeded(), lambda _: groups, clusters=8)
    assert full[1].shape == (6, 30) and 0 not in full
    short, _ = graph_lists(
        ListPlan(32, 30, 2, (), 1, shared=True), {1: co_act}, seeded(), lambda _: groups, clusters=8, top_up=False
    )
    assert short[0].shape == (20,)


def test_short_lists_of_unequal_length_are_told():
    co_act, _ = planted(2, 16)
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 5)
    plan = ListPlan(32, 30, 1, (0,), 8)
    with raises(DataError, match=r"lists of \d+ to \d+ units"):
        graph_lists(plan, {0: co_act}, seeded(), lambda _: labels, clusters=2, top_up=False)
    assert graph_lists(plan, {0: co_act}, seeded(), lambda _: labels, clusters=2)[0][0].shape == (8, 30)


def test_graph_lists_of_the_simplified_tool():
    co_act, groups = planted(4, 8)
    plan = NeuronPlan("graph", 32, 0.25, 2, (1,), 3)
    lists, prob = neuron_lists(plan, seeded(), {0: co_act, 1: co_act}, lambda _: groups)
    assert lists[1].shape == (3, 8) and sorted(prob) == [0, 1]
    calls = []
    across = NeuronPlan("graph", 32, 0.25, 2, (0, 1), 3, across_layers=True)
    lists, _ = neuron_lists(across, seeded(), {0: co_act, 1: co_act}, lambda g: calls.append(g) or groups)
    assert len(calls) == 1 and sorted(lists) == [0, 1]
    with raises(SpecError, match="needs a partitioner"):
        neuron_lists(plan, seeded(), {0: co_act, 1: co_act})
    # Seven pairs that fire together and 86 neurons that never do: six parts are drawn, none of them the large one.
    pairs = torch.cat([torch.arange(14) // 2, torch.full((86,), 7)])
    graph = torch.zeros(100, 100)
    graph[:14, :14] = (pairs[:14, None] == pairs[:14]).float().fill_diagonal_(0)
    with raises(DataError, match="hold only 12 of the 20"):
        neuron_lists(NeuronPlan("graph", 100, 0.2, 1, (0,), 2), seeded(), {0: graph}, lambda _: pairs)


@mark.parametrize("channels", ["per_expert", "shared_topk"])
@mark.parametrize("donor", [True, False])
def test_recycling_by_graph(channels, donor):
    graph = GraphOptions(method="louvain", resolution=1.05)
    options = RecycleOptions(select="co_act", graph=graph, channels=channels)
    made = recycle(
        dense_state(),
        successor_state(),
        options,
        generator=seeded(),
        statistics=record(),
        donor=dense_state(dim=8, seed=5) if donor else None,
    )
    assert made.experts.neuron[1].shape == (5, 32) and made.experts.channel[2].shape == (5, 8)
    assert (made.dense is None) == donor


def test_graphs_that_make_no_sense_are_told():
    co_act, groups = planted()
    with raises(SpecError, match="64 parts cannot be made of 32"):
        partition(co_act, GraphOptions(parts=64))
    with raises(DataError, match="square"):
        partition(co_act[:3])
    with raises(DataError, match="not symmetric"):
        partition(co_act.triu())
    with raises(DataError, match="negative or non-finite"):
        partition(-co_act)
    with raises(DataError, match="ever active together"):
        partition(torch.eye(40))
    with raises(DataError, match=r"labels of shape \(3,\)"):
        part_probabilities(co_act, groups[:3])
    with raises(DataError, match="weights='scaled'"):
        importorskip("pymetis")
        partition(co_act * 1e9, GraphOptions(parts=4, weights="truncated"))
    plan = ListPlan(32, 4, 1, (0,), 2)
    with raises(DataError, match="no co-activation of layers"):
        graph_lists(plan, {}, seeded(), lambda _: groups)
    with raises(DataError, match="has any co-activation inside"):
        graph_lists(plan, {0: co_act}, seeded(), lambda _: torch.arange(32))
    with raises(DataError, match=r"shape \(32, 32\) does not fit 30"):
        graph_lists(ListPlan(30, 4, 1, (0,), 2), {0: co_act}, seeded(), lambda _: groups)


def test_without_pymetis_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with raises(EnvironmentProblem, match=r"pip install 'moepipe\[graph\]'"):
        partition(planted()[0], GraphOptions(parts=4))
