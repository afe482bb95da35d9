"""Few-shot episodes, class subsets and repeated augmentation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import DataError, SpecError
from workers.few_shot import (
    RepeatedAugmentationSampler,
    class_names,
    class_subset,
    fewshot_split,
    repeated_indices,
    selected_rows,
)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 20), n=st.integers(1, 4), val=st.integers(1, 6), seed=st.integers(0, 999))
def test_episodes_are_balanced_and_disjoint(k, n, val, seed):
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 10))
    episode = fewshot_split(targets, k, n, val, seed, num_classes=20)
    assert episode.overlap == 0 and len(set(episode.classes)) == k
    assert len(np.unique(episode.train_index)) == k * n and len(np.unique(episode.val_index)) == k * val
    assert np.bincount(episode.train_label, minlength=k).tolist() == [n] * k
    ordered = np.array(sorted(episode.classes))
    assert (ordered[episode.val_label] == targets[episode.val_index]).all()
    again = fewshot_split(targets, k, n, val, seed, num_classes=20)
    assert (again.train_index == episode.train_index).all()


def test_the_official_protocol_leaks_and_takes_what_there_is():
    targets = np.repeat(np.arange(100), 5)
    episode = fewshot_split(targets, 8, 2, 6, 1, protocol="official")
    assert episode.overlap == 16 and len(episode.val_index) == 8 * 5
    with pytest.raises(DataError, match="has 5 rows; 2 to learn from and 6"):
        fewshot_split(targets, 8, 2, 6, 1)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (101, 1, 1)])
def test_impossible_episodes_are_refused(counts):
    with pytest.raises(SpecError, match="of 100 classes"):
        fewshot_split([0, 1], *counts, seed=0)
    with pytest.raises(SpecError, match="Did you mean 'official'"):
        fewshot_split([0, 1], 1, 1, 1, 0, protocol="offical")


def test_class_subsets_answer_labels_of_the_subset():
    base, subset = class_names("imagenet-1k"), class_names("imagenet-r")
    columns = class_subset("imagenet-1k", list(reversed(subset)))
    assert len(base) == 1000 and len(subset) == 200 and columns.dtype == np.int64
    assert [base[column] for column in columns] == subset
    tiny = class_subset("tiny-imagenet-200", class_names("tiny-imagenet-r"))
    assert len(tiny) == 62 and (np.diff(tiny) > 0).all()


def test_unknown_classes_are_named():
    with pytest.raises(DataError, match="n99999999"):
        class_subset("tiny-imagenet-200", ["n01443537", "n99999999"])
    with pytest.raises(DataError, match="double"):
        class_subset("tiny-imagenet-200", ["n01443537", "n01443537"])
    with pytest.raises(SpecError, match="base label set"):
        class_subset("imagenet", [])
    with pytest.raises(SpecError, match="Did you mean 'imagenet-r'"):
        class_names("imagenet-rr")


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 900),
    world=st.integers(1, 5),
    repeats=st.integers(1, 4),
    epoch=st.integers(0, 5),
    round_to=st.sampled_from([1, 16, 256]),
)
def test_ranks_share_the_copies(length, world, repeats, epoch, round_to):
    each = [repeated_indices(length, world, rank, epoch, repeats, round_to) for rank in range(world)]
    count = selected_rows(length, world, round_to)
    assert all(len(part) == count and part.dtype == np.int64 for part in each)
    dealt = np.stack(each, axis=1).reshape(-1) if count else np.empty(0, dtype=np.int64)
    assert dealt.size == 0 or (dealt.min() >= 0 and dealt.max() < length)
    for place in range(0, len(dealt) - repeats + 1, repeats):
        assert len(set(dealt[place : place + repeats])) == 1


def test_the_sampler_changes_by_epoch_and_refuses_empty_epochs():
    sampler = RepeatedAugmentationSampler(600, world_size=2, rank=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert len(sampler) == len(first) == 256 and list(sampler) != first
    with pytest.raises(DataError, match="round_to to at most 100"):
        RepeatedAugmentationSampler(100)
    assert len(list(RepeatedAugmentationSampler(100, round_to=1))) == 100
    with pytest.raises(SpecError, match="rank=2"):
        RepeatedAugmentationSampler(600, world_size=2, rank=2)
    with pytest.raises(SpecError, match="world_size=0"):
        selected_rows(10, 0)
