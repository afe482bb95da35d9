"""CIFAR files: torchvision reads the generated ones the same way, and nothing in a file is run."""

from __future__ import annotations

import os
import pickle
import tarfile

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError
from workers import catalogue
from workers.data import load_data
from workers.datasets import cifar10, cifar100

SETS = {"cifar10": (cifar10, "CIFAR10"), "cifar100": (cifar100, "CIFAR100")}


@pytest.mark.parametrize("name", SETS)
def test_the_layout_is_torchvisions(name, tmp_path, monkeypatch):
    from torchvision import datasets

    catalogue.miniature(name, tmp_path, seed=1)
    assert catalogue.verify(name, tmp_path).ok
    ours = load_data(name, {}, tmp_path)
    assert "_miniature" in ours.value_names
    kind = getattr(datasets, SETS[name][1])
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)  # class names alone, which are not read here
    train, test = (kind(tmp_path, train=part) for part in (True, False))
    assert np.array_equal(ours.images.array, np.concatenate([train.data, test.data]))
    assert ours.labels.tolist() == [*train.targets, *test.targets]
    assert len(ours.splits["train"]) + len(ours.splits["val"]) == len(train)
    assert ours.splits["test"].tolist() == list(range(len(train), len(train) + len(test)))


def test_an_archive_is_taken_in(tmp_path):
    catalogue.miniature("cifar100", tmp_path / "made", seed=0)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "cifar-100-python", "cifar-100-python")
    catalogue.import_archive("cifar100", tmp_path / "cifar.tar.gz", tmp_path / "data")
    ours, made = (load_data("cifar100", {}, tmp_path / where) for where in ("data", "made"))
    assert np.array_equal(ours.images.array, made.images.array)
    with pytest.raises(DataError, match="exists already"):
        catalogue.import_archive("cifar100", tmp_path / "cifar.tar.gz", tmp_path / "data")
    with pytest.raises(NotFoundError, match="data_batch_1"):
        catalogue.import_archive("cifar10", tmp_path / "cifar.tar.gz", tmp_path / "data")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    catalogue.miniature("cifar100", tmp_path, seed=0)
    path = tmp_path / "cifar-100-python" / "train"
    whole = path.read_bytes()
    path.write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(DataError, match="mkdir, which is not run"):
        load_data("cifar100", {}, tmp_path)
    assert not (tmp_path / "evil").exists()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="damaged"):
        load_data("cifar100", {}, tmp_path)
    path.unlink()
    with pytest.raises(NotFoundError, match="moepipe data import cifar100"):
        load_data("cifar100", {}, tmp_path)
