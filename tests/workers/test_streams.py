import numpy as np
import pytest

from moe.errors import DataError, SpecError
from workers.streams import SETTINGS, stream

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 6, 400)
DOMAINS = [(7, np.arange(0, 150)), (2, np.arange(150, 153)), (5, np.arange(200, 400))]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_row_arrives_once_and_the_same_way_again(setting):
    batches = stream(DOMAINS, LABELS, setting, 16, seed=3)
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == sorted(np.concatenate([r for _, r in DOMAINS]).tolist())
    assert all(1 <= len(batch.rows) <= 16 for batch in batches)
    again = np.concatenate([batch.rows for batch in stream(DOMAINS, LABELS, setting, 16, seed=3)])
    other = np.concatenate([batch.rows for batch in stream(DOMAINS, LABELS, setting, 16, seed=4)])
    assert np.array_equal(rows, again) and not np.array_equal(rows, other)
    assert batches[0].reset


@pytest.mark.parametrize("setting", ["reset_each_shift", "continual", "correlated", "reset_each_shift_correlated"])
def test_domains_come_one_after_the_other(setting):
    batches = stream(DOMAINS, LABELS, setting, 16, seed=0)
    met = list(dict.fromkeys(batch.domain for batch in batches))
    assert met == [7, 2, 5]
    members = {domain: set(rows.tolist()) for domain, rows in DOMAINS}
    assert all(set(batch.rows.tolist()) <= members[batch.domain] for batch in batches)
    starts = [i for i, batch in enumerate(batches) if i == 0 or batch.domain != batches[i - 1].domain]
    resets = [i for i, batch in enumerate(batches) if batch.reset]
    assert resets == (starts if setting.startswith("reset") else [0])


def test_mixed_batches_hold_several_domains():
    batches = stream(DOMAINS, LABELS, "mixed_domains", 32, seed=0)
    assert all(batch.domain is None for batch in batches)
    assert np.mean([len({int(row) // 200 for row in batch.rows}) for batch in batches]) > 1.8


def label_changes(batches, labels=LABELS):
    found = labels[np.concatenate([batch.rows for batch in batches])]
    return float(np.mean(found[1:] != found[:-1]))


@pytest.mark.parametrize(
    "plain, clustered", [("continual", "correlated"), ("mixed_domains", "mixed_domains_correlated")]
)
def test_labels_cluster_in_correlated_settings(plain, clustered):
    assert label_changes(stream(DOMAINS, LABELS, clustered, 16, 0)) < 0.25
    assert label_changes(stream(DOMAINS, LABELS, plain, 16, 0)) > 0.7


def test_values_are_clustered_in_bins():
    values = RNG.normal(size=400).astype(np.float32)
    order = np.concatenate([b.rows for b in stream(DOMAINS, values, "correlated", 16, 0)])
    loose = np.concatenate([b.rows for b in stream(DOMAINS, values, "continual", 16, 0)])
    assert np.abs(np.diff(values[order])).mean() < 0.7 * np.abs(np.diff(values[loose])).mean()


def test_refusals():
    with pytest.raises(SpecError, match="continual"):
        stream(DOMAINS, LABELS, "continous", 16, 0)
    with pytest.raises(SpecError):
        stream(DOMAINS, LABELS, "continual", 0, 0)
    with pytest.raises(DataError):
        stream([(1, np.arange(0))], LABELS, "continual", 4, 0)
