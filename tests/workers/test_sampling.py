import numpy as np
import pytest
import torch

from moe.errors import DataError, SpecError
from workers.sampling import (
    DomainSampler,
    EpisodeSampler,
    EpochSampler,
    domain_batches,
    domain_groups,
    group_batches,
    group_index,
)


def test_camelyon_split_of_the_released_run():
    slides = np.array([*range(10), *range(30, 50)])
    split = domain_groups(np.repeat(slides, 3), 5, 3407)
    assert split.groups[0] == [45, 41, 0, 2, 40, 46]
    assert [len(group) for group in split.groups] == [6] * 5
    assert sorted(split.owner) == slides.tolist()
    assert all(split.owner[domain] == expert for expert, group in enumerate(split.groups) for domain in group)


@pytest.mark.parametrize(
    "domains, experts, sizes", [(243, 10, [25, 24, 24, 25, 24, 24, 25, 24, 24, 24]), (11, 4, [3, 3, 3, 2])]
)
def test_official_sizes(domains, experts, sizes):
    assert [len(group) for group in domain_groups(np.arange(domains), experts, 1).groups] == sizes


def test_float_division_of_the_public_code():
    split = domain_groups(np.arange(10), 6, 0)
    order = [domain for group in split.groups for domain in group]
    assert split.owner[order[5]] == 2  # 5 * 6 // 10 would be 3


def test_more_experts_than_domains_and_one_domain():
    assert [len(g) for g in domain_groups(np.array([7, 9]), 5, 0).groups].count(0) == 3
    assert domain_groups(np.array([7]), 1, 0).groups == [[7]]
    with pytest.raises(DataError):
        domain_groups(np.array([], dtype=np.int64), 2, 0)
    with pytest.raises(SpecError):
        domain_groups(np.array([1]), 0, 0)


def test_groups_follow_the_column_order_not_the_argument_order():
    metadata = np.array([[0, 2, 5], [1, 0, 5], [1, 2, 0]])
    fields = ("region", "year", "y")
    group, count = group_index(metadata, fields, ("year", "region"))
    assert count == 6 and group.tolist() == [4, 1, 5]
    wider, count = group_index(metadata, fields, ("year", "region"), {"region": 4, "year": 3})
    assert count == 12 and wider.tolist() == [8, 1, 9]


def test_group_index_refuses_what_it_cannot_number():
    with pytest.raises(SpecError, match="yaer"):
        group_index(np.zeros((1, 1)), ("year",), ("yaer",))
    with pytest.raises(DataError):
        group_index(np.array([[-1]]), ("year",), ("year",))
    with pytest.raises(DataError):
        group_index(np.array([[5]]), ("year",), ("year",), {"year": 5})


def test_group_batches_shapes_and_limits():
    group = np.repeat([3, 5, 9], [2, 20, 30])
    batches = group_batches(group, 10, seed=0, groups_per_batch=2, epochs=3)
    assert batches.shape == (15, 10)
    for batch in batches:
        assert len(set(group[batch[:5]])) == len(set(group[batch[5:]])) == 1
        assert group[batch[0]] != group[batch[5]]
    with pytest.raises(SpecError):
        group_batches(group, 10, 0, groups_per_batch=3)
    with pytest.raises(DataError):
        group_batches(group, 8, 0, groups_per_batch=4)


GROUP = np.repeat([4, 1, 8], [3, 40, 9])


def test_episodes_are_a_function_of_seed_and_step():
    one, other = EpisodeSampler(GROUP, 12, 5), EpisodeSampler(GROUP, 12, 5)
    [one.batch(step) for step in range(7)]
    assert np.array_equal(one.batch(7), other.batch(7))
    assert not all(np.array_equal(one.batch(s), EpisodeSampler(GROUP, 12, 6).batch(s)) for s in range(5))
    assert one.steps_per_epoch == 52 // 12


def test_episodes_draw_domains_uniformly_and_rows_without_replacement_where_possible():
    sampler = EpisodeSampler(GROUP, 12, 0)
    seen = []
    for step in range(600):
        batch = sampler.batch(step)
        assert len(batch) == 12 and len(set(GROUP[batch])) == 1
        assert GROUP[batch[0]] == sampler.domain(step)
        seen.append(int(GROUP[batch[0]]))
        if seen[-1] == 1:
            assert len(set(batch.tolist())) == 12
    assert all(abs(seen.count(domain) - 200) < 60 for domain in (1, 4, 8))


def test_disjoint_episodes_never_share_rows_between_support_and_query():
    sampler = EpisodeSampler(np.append(GROUP, 99), 12, 0, parity="disjoint", support=8)
    domains = set()
    for step in range(200):
        batch = sampler.batch(step)
        assert len(batch) == 12 and not set(batch[:8].tolist()) & set(batch[8:].tolist())
        domains.add(sampler.domain(step))
    assert domains == {1, 4, 8}  # the domain of one row cannot be divided


def test_episode_sampler_refuses_bad_settings():
    with pytest.raises(SpecError):
        EpisodeSampler(GROUP, 12, 0, parity="disjoint")
    with pytest.raises(SpecError):
        EpisodeSampler(GROUP, 12, 0, parity="other")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        EpisodeSampler(np.array([1, 2]), 4, 0, parity="disjoint", support=2)


def test_epochs_cover_every_row_once_and_resume_anywhere():
    rows = np.arange(100, 123)
    sampler = EpochSampler(rows, 5, 3)
    assert sampler.steps_per_epoch == 5
    epochs = [np.concatenate([sampler.batch(5 * epoch + i) for i in range(5)]) for epoch in range(2)]
    assert all(sorted(epoch.tolist()) == rows.tolist() for epoch in epochs)
    assert not np.array_equal(*epochs)
    assert np.array_equal(EpochSampler(rows, 5, 3).batch(8), sampler.batch(8))
    assert len(sampler.batch(4)) == 3
    assert EpochSampler(rows, 5, 3, drop_last=True).steps_per_epoch == 4
    assert EpochSampler(rows[:3], 5, 3, drop_last=True).steps_per_epoch == 1
    with pytest.raises(DataError):
        EpochSampler(rows[:0], 5, 3)


def test_domain_batches_keep_rows_in_order_and_never_mix():
    group = np.array([2, 7, 2, 2, 7, 2, 2])
    found = {domain: [batch.tolist() for batch in batches] for domain, batches in domain_batches(group, 4)}
    assert found == {2: [[0, 2, 3, 5], [6]], 7: [[1, 4]]}
    assert domain_batches(np.array([], dtype=np.int64), 4) == []


def test_balanced_batches_favour_no_domain():
    sampler = DomainSampler(np.arange(100, 152), GROUP, 30, 0)
    drawn = np.concatenate([sampler.batch(step) for step in range(100)])
    seen = GROUP[drawn - 100]
    assert all(abs(np.mean(seen == domain) - 1 / 3) < 0.04 for domain in (1, 4, 8))
    assert set(drawn.tolist()) == set(range(100, 152))
    assert np.array_equal(DomainSampler(np.arange(100, 152), GROUP, 30, 0).batch(5), sampler.batch(5))
    assert sampler.steps_per_epoch == 2
    with pytest.raises(DataError):
        DomainSampler(np.arange(0), GROUP[:0], 4, 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_batch, uniform, distinct", [(1, True, True), (2, False, True), (3, True, False)])
def test_group_batches_are_those_of_wilds_own_sampler(seed, per_batch, uniform, distinct):
    from workers.wilds_compat import evaluation

    with evaluation():
        from wilds.common.data_loaders import GroupSampler

    group = np.random.default_rng(seed).integers(0, 7, 80)
    np.random.seed(seed)
    theirs = GroupSampler(torch.from_numpy(group), 12, per_batch, uniform, distinct)
    wanted = [[int(row) for row in batch] for _ in range(2) for batch in theirs]
    assert group_batches(group, 12, seed, per_batch, uniform, distinct, epochs=2).tolist() == wanted
