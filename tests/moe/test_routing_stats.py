"""Routing statistics against counts by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import SpecError
from moe.layers.router import Routing
from moe.routing_stats import RoutingStats, group_table


def decision(experts, kept=None, weights=None, balance=1.0, num_experts=3):
    chosen = torch.tensor(experts)
    kept = torch.ones_like(chosen, dtype=torch.bool) if kept is None else torch.tensor(kept)
    weights = kept.float() if weights is None else torch.tensor(weights)
    counts = torch.bincount(chosen[kept], minlength=num_experts)
    return Routing(chosen, weights, kept, torch.tensor(balance), counts)


def test_counts_load_entropy_and_drops():
    stats = RoutingStats(3)
    stats.add(decision([[0, 1], [0, 1]], [[True, False], [True, True]], [[0.5, 0.0], [0.75, 0.25]], balance=1.0))
    stats.add(decision([[1, 0]], [[False, False]], balance=2.0), scores_NE=torch.tensor([[0.5, 0.5, 0.0]]))
    report = stats.report()
    assert report.tokens == 3 and report.top_k == 2
    assert report.chosen == (3, 3, 0) and report.kept == (2, 1, 0) and report.unused == (2,)
    assert report.load == pytest.approx((2 / 3, 1 / 3, 0)) and report.max_load == pytest.approx(2)
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert report.load_entropy == pytest.approx(entropy) and report.load_balance == pytest.approx(entropy / math.log(3))
    assert report.gate_entropy == pytest.approx(math.log(2))
    assert report.drop_rate == pytest.approx(0.5) and report.lost_tokens == pytest.approx(1 / 3)
    assert report.mean_weight == pytest.approx((0.625, 0.25, 0.0)) and report.balance == 1.5
    loaded = json.loads(report.to_json())
    assert loaded["chosen"] == [3, 3, 0] and loaded["by_domain"] is None
    assert set(report.scalars()) == {
        "max_load", "load_entropy", "load_balance", "drop_rate", "lost_tokens", "balance", "gate_entropy"
    }  # fmt: skip


def test_tables_by_domain_and_class():
    stats = RoutingStats(3, ["photo", "sketch"], ["cat", "dog"])
    # Two images of two tokens each: groups given by image.
    stats.add(decision([[0], [0], [2], [2]]), domain=torch.tensor([0, 1]), label=torch.tensor([1, 1]))
    report = stats.report()
    assert report.by_domain.names == ("photo", "sketch") and report.by_domain.counts == ((2, 0, 0), (0, 0, 2))
    assert report.by_domain.mutual_information == pytest.approx(math.log(2))
    assert report.by_domain.normalised_information == pytest.approx(1)
    assert report.by_class.counts == ((0, 0, 0), (2, 0, 2)) and report.by_class.shares[0] == (0, 0, 0)
    assert report.by_class.mutual_information == pytest.approx(0, abs=1e-12)
    assert report.by_class.normalised_information == 0
    assert report.scalars()["domain_information"] == pytest.approx(math.log(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**20))
def test_merging_is_adding_and_information_has_its_bounds(experts, batches, seed):
    g = torch.Generator().manual_seed(seed)
    whole, parts = RoutingStats(experts, ["a", "b"]), [RoutingStats(experts, ["a", "b"]) for _ in range(2)]
    for index in range(batches):
        chosen = torch.randint(experts, (7, 2), generator=g).tolist()
        kept = (torch.rand(7, 2, generator=g) > 0.3).tolist()
        routing, domain = decision(chosen, kept, num_experts=experts), torch.randint(2, (7,), generator=g)
        scores = torch.rand(7, experts, generator=g).softmax(-1)
        whole.add(routing, scores, domain)
        parts[index % 2].add(routing, scores, domain)
    parts[0].merge(parts[1])
    merged, report = parts[0].report(), whole.report()
    assert merged.chosen == report.chosen and merged.by_domain == report.by_domain
    assert merged.gate_entropy == pytest.approx(report.gate_entropy) and merged.balance == pytest.approx(report.balance)
    table = report.by_domain
    assert 0 <= table.mutual_information <= math.log(2) + 1e-9 and 0 <= table.normalised_information <= 1
    assert sum(report.load) == pytest.approx(1) or sum(report.kept) == 0


def test_nothing_added_and_no_tokens():
    stats = RoutingStats(2, ["a"])
    assert stats.report().tokens == 0 and stats.report().load == (0, 0) and stats.report().max_load == 0
    stats.add(decision([[0]], num_experts=2)._replace(
        experts_NK=torch.zeros(0, 1, dtype=torch.long), kept_NK=torch.ones(0, 1, dtype=torch.bool),
        weights_NK=torch.zeros(0, 1)), torch.zeros(0, 2), domain=torch.zeros(0, dtype=torch.long))  # fmt: skip
    json.loads(stats.report().to_json())
    assert RoutingStats(1).report().load_balance == 1.0


def test_errors():
    stats = RoutingStats(3, ["a", "b"])
    stats.add(decision([[0], [1]]))
    with pytest.raises(SpecError, match="2 choices per token"):
        stats.add(decision([[0, 1]]))
    with pytest.raises(SpecError, match="3 domain numbers for 2 tokens"):
        stats.add(decision([[0], [1]]), domain=torch.tensor([0, 1, 0]))
    with pytest.raises(SpecError, match="from 0 to 2"):
        stats.add(decision([[0], [1]]), domain=torch.tensor([0, 2]))
    with pytest.raises(SpecError, match="no names"):
        stats.add(decision([[0], [1]]), label=torch.tensor([0, 1]))
    with pytest.raises(SpecError, match="Expert 2 was chosen among 2"):
        RoutingStats(2).add(decision([[2]]))
    with pytest.raises(SpecError, match="different layers"):
        stats.merge(RoutingStats(4))
    with pytest.raises(SpecError, match="1 names for 2 groups"):
        group_table(torch.zeros(2, 3, dtype=torch.int64), ["a"])
    with pytest.raises(SpecError, match="at least one"):
        RoutingStats(0)
