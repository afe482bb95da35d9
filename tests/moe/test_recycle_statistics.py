"""Activation statistics: streamed, sharded and merged; hooks into timm models."""

import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pytest import raises
from torch.testing import assert_close

from moe.conversion.recycle.options import StatisticsOptions
from moe.conversion.recycle.probe import GATED_PLACES, collect_statistics
from moe.conversion.recycle.record import StatisticsRecord, sample_rows
from moe.conversion.recycle.statistics import StatisticsAccumulator, merge_all
from moe.errors import CheckpointError, DataError, SpecError
from tests.moe.recycle_helpers import few, record, seeded, vit

EVERY = ("L1", "L2", "act_patrn", "co_act")


# -- statistics ------------------------------------------------------------------------------------------------------

batches_of = st.lists(st.integers(1, 4), min_size=1, max_size=9)
averagings = st.sampled_from(("groups", "batch_sum", "positions"))


def stream(options, batches, numbers=None):
    accumulator = StatisticsAccumulator(options)
    for index, batch in enumerate(batches):
        accumulator.update({("mlp_act", 0): batch, ("norm2", 3): batch[..., :2]}, numbers and numbers[index])
    return accumulator


def random_batches(sizes, seed, width=5):
    return [
        torch.randn(size, 3, width, generator=seeded(seed + i), dtype=torch.float64) for i, size in enumerate(sizes)
    ]


def same_record(ours, theirs):
    a, b = ours.finalise(torch.float64).to_tensors(), theirs.finalise(torch.float64).to_tensors()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert_close(value, b[name], rtol=1e-12, atol=1e-12)
    return a


@few
@given(batches_of, averagings, st.integers(1, 4), st.data())
def test_shards_in_any_split_and_order_merge_to_the_streamed_pass(sizes, averaging, group, data):
    options = StatisticsOptions(metrics=EVERY, averaging=averaging, group=group)
    batches = random_batches(sizes, data.draw(st.integers(0, 99)))
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(batches), max_size=len(batches)))
    shards = []
    for owner in data.draw(st.permutations(range(3))):
        numbers = data.draw(st.permutations([i for i, own in enumerate(owners) if own == owner]))
        shard = stream(options, [batches[i] for i in numbers], list(numbers) or None)
        shards.append(StatisticsAccumulator.from_state(shard.state_dict()))
    same_record(merge_all(shards), stream(options, batches))


@few
@given(batches_of, st.integers(0, 99))
def test_true_averages_do_not_depend_on_the_batches(sizes, seed):
    options = StatisticsOptions(metrics=EVERY, averaging="positions")
    batches = random_batches(sizes, seed)
    tensors = same_record(stream(options, batches), stream(options, [torch.cat(batches)]))
    x = torch.cat(batches).reshape(-1, 5)
    active = (x > 0).double()
    assert_close(tensors["mlp_act.L1.0"], x.abs().mean(dim=0))
    assert_close(tensors["mlp_act.L2.0"], x.square().mean(dim=0).sqrt())
    assert_close(tensors["mlp_act.co_act.0"], active.T @ active / len(x))


@few
@given(batches_of, st.integers(1, 3), st.integers(0, 99))
def test_groups_are_means_of_group_means_of_batch_sums(sizes, group, seed):
    options = StatisticsOptions(metrics=("L1", "L2"), group=group)
    batches = random_batches(sizes, seed)
    got = stream(options, batches).finalise(torch.float64)
    roots = [batch.reshape(-1, 5).square().sum(dim=0).sqrt() for batch in batches]
    groups = [torch.stack(roots[i : i + group]).mean(dim=0) for i in range(0, len(roots), group)]
    assert_close(got.of("mlp_act", "L2")[0], torch.stack(groups).mean(dim=0))


@few
@given(st.integers(0, 99), st.permutations(range(5)))
def test_statistics_follow_a_permutation_of_channels_and_ignore_one_of_positions(seed, order):
    options = StatisticsOptions(metrics=EVERY, averaging="batch_sum", threshold="mean_std")
    batch = random_batches([4], seed)[0]
    plain, moved = StatisticsAccumulator(options), StatisticsAccumulator(options)
    plain.add("x", 0, batch)
    moved.add("x", 0, batch.flip(0).flip(1)[..., list(order)])
    a, b = plain.finalise(torch.float64), moved.finalise(torch.float64)
    assert_close(a.of("x", "L1")[0][list(order)], b.of("x", "L1")[0])
    assert_close(a.of("x", "co_act")[0][list(order)][:, list(order)], b.of("x", "co_act")[0])
    assert not a.of("x", "co_act")[0].diagonal().any()


def test_state_does_not_grow_with_the_stream():
    options = StatisticsOptions(metrics=EVERY, group=2)
    sizes = [
        sum(value.numel() for value in stream(options, random_batches([1] * n, 0)).state_dict().values())
        for n in (5, 30)
    ]
    assert sizes[0] == sizes[1]


def test_large_batches_are_reduced_in_chunks_to_the_same_numbers(monkeypatch):
    batch = torch.randn(7, 9, 5, generator=seeded(), dtype=torch.float64)
    whole = stream(StatisticsOptions(metrics=EVERY), [batch])
    monkeypatch.setattr("moe.conversion.recycle.statistics.CHUNK_VALUES", 11)
    same_record(stream(StatisticsOptions(metrics=EVERY), [batch]), whole)


def test_a_missing_or_doubled_shard_is_told():
    batches = random_batches([1] * 5, 0)
    options = StatisticsOptions(group=2)
    half = stream(options, batches[2:], [2, 3, 4])
    with raises(DataError, match="2 batches before the last group of 2 instead of 4"):
        half.finalise()
    whole = stream(options, batches)
    whole.merge(stream(options, batches[:2], [0, 1]))
    with raises(DataError, match="exactly once"):
        whole.finalise()


def test_bad_activations_and_merges_are_told():
    accumulator = StatisticsAccumulator()
    bad = torch.ones(2, 3, 4)
    bad[0, 1, 2] = torch.nan
    with raises(DataError, match=r"mlp_act, layer 7.*1 of 4 channels hold non-finite.*first channel 2"):
        accumulator.add("mlp_act", 7, bad)
    with raises(DataError, match=r"shape \(0, 3\)"):
        accumulator.add("mlp_act", 7, torch.ones(0, 3))
    accumulator.add("mlp_act", 7, torch.ones(2, 3))
    with raises(DataError, match=r"shape \(4,\), but \(3,\) before"):
        accumulator.add("mlp_act", 7, torch.ones(2, 4))
    with raises(SpecError, match="cannot be merged"):
        accumulator.merge(StatisticsAccumulator(StatisticsOptions(group=3)))
    with raises(SpecError, match="no 'co_act' of place 'norm2'"):
        accumulator.finalise().of("norm2", "co_act")
    with raises(DataError, match="no state"):
        StatisticsAccumulator.from_state({})
    with raises(ValidationError):
        StatisticsOptions(threshold="percentile", value=1.0)


def test_hooks_read_a_timm_model_and_leave_it_as_it_was():
    model = vit().train()
    model.blocks[1].eval()
    images = [torch.randn(2, 3, 32, 32, generator=seeded(i)) for i in range(3)]
    got = collect_statistics(model, images, StatisticsOptions(metrics=("L1",), averaging="positions")).finalise()
    assert sorted(got.to_tensors()) == sorted(
        f"{p}.L1.{i}" for p in ("mlp_act", "attn_proj", "norm2") for i in range(3)
    )
    assert model.training and not model.blocks[1].training and model.blocks[2].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    seen = []
    model.eval().blocks[2].mlp.act.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    for batch in images:
        model(batch)
    assert_close(got.of("mlp_act", "L1")[2], torch.cat(seen).abs().mean(dim=(0, 1)))
    shards = [collect_statistics(model, [images[i]], numbers=[i]) for i in (2, 0, 1)]
    same_record(merge_all(shards), collect_statistics(model, images))


def test_gated_models_are_read_where_their_hidden_vector_is():
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    got = collect_statistics(model, [torch.randn(1, 3, 28, 28)], places=GATED_PLACES).finalise()
    assert len(got.of("mlp_act", "L2")[1]) == model.blocks[1].mlp.fc2.in_features


def test_models_without_such_modules_are_told():
    with raises(CheckpointError, match="no list of blocks 'blocks'"):
        collect_statistics(torch.nn.Sequential(torch.nn.Linear(3, 3)), [torch.ones(1, 3)])
    with raises(CheckpointError, match=r"blocks.0 has no module 'mlp.fc2'|blocks.0 has no module"):
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        collect_statistics(model, [torch.ones(1, 2)])
    with raises(DataError, match="No images"):
        collect_statistics(vit(), [])


def test_record_survives_flat_names_and_samples_are_reproducible():
    values = record()
    again = StatisticsRecord.from_tensors(values.to_tensors())
    assert again.to_tensors().keys() == values.to_tensors().keys()
    with raises(DataError, match=r"place\.metric\.layer"):
        StatisticsRecord.from_tensors({"odd": torch.ones(1)})
    assert sample_rows(10, 3).tolist() == [0, 1, 2]
    rows = sample_rows(1000, 20, "random", seeded(1))
    assert torch.equal(rows, sample_rows(1000, 20, "random", seeded(1)))
    assert len(rows.unique()) == 20 and bool((rows.diff() > 0).all())
    with raises(SpecError):
        sample_rows(10, 3, "random")
