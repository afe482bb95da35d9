import numpy as np
import pytest

from moe.errors import DataError, SpecError
from workers.intervals import PairedBootstrap


def test_draws_keep_domains_and_their_sizes():
    groups = np.array([4, 9, 4, 4, 9, 1])
    bootstrap = PairedBootstrap(groups, 50, seed=1)
    for replicate in range(50):
        assert groups[bootstrap.draw(replicate)].tolist() == [1, 4, 4, 4, 9, 9]
    assert len({bootstrap.draw(r).tobytes() for r in range(50)}) > 20
    assert np.array_equal(bootstrap.draw(7), PairedBootstrap(groups, 50, seed=1).draw(7))


def test_interval_of_a_mean_has_the_textbook_width():
    values = np.random.default_rng(0).normal(size=400)
    bootstrap = PairedBootstrap(np.zeros(400, dtype=int), 2000, seed=0)
    interval = bootstrap.interval(bootstrap.run({"m": lambda rows: np.array([values[rows].mean()])})["m"][:, 0])
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_methods_are_paired():
    correct = np.random.default_rng(0).random(300) < 0.5
    better = correct.copy()
    better[np.flatnonzero(~correct)[:15]] = True
    statistics = {"a": lambda rows: np.array([correct[rows].mean()]), "b": lambda rows: np.array([better[rows].mean()])}
    bootstrap = PairedBootstrap(np.zeros(300, dtype=int), 500, seed=0)
    found = bootstrap.run(statistics)
    gain = bootstrap.interval(found["b"][:, 0] - found["a"][:, 0])
    alone = bootstrap.interval(found["a"][:, 0])
    assert 0 < gain.low < 0.05 < gain.high
    assert gain.high - gain.low < 0.5 * (alone.high - alone.low)


def test_refusals():
    with pytest.raises(DataError):
        PairedBootstrap(np.zeros(0))
    with pytest.raises(SpecError):
        PairedBootstrap(np.zeros(3), replicates=0)
    with pytest.raises(SpecError):
        PairedBootstrap(np.zeros(3), confidence=1.0)
