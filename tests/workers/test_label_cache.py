"""Labels on disk: official files are read safely, own ones are keyed by the weights."""

import numpy as np
import pytest
import torch

from moe.conversion import split
from moe.errors import CheckpointError, NotFoundError, SpecError
from workers import label_cache
from workers.label_cache import cached_labels, read_labels


def test_official_files_are_read(tmp_path):
    labels = torch.arange(12) % 3
    np.save(tmp_path / "bert_layer1_12_4.npy", labels.numpy().astype(np.int32))
    torch.save(labels, tmp_path / "model.layers.1.mlp_clusters3.pth")
    for file in tmp_path.iterdir():
        assert torch.equal(read_labels(file, 12, 3), labels)
    with pytest.raises(SpecError, match="expected 24 integers"):
        read_labels(file, 24, 3)
    with pytest.raises(NotFoundError, match="no file of labels"):
        read_labels(tmp_path / "absent.npy", 12, 3)


def test_nothing_else_is_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save(Bomb(), tmp_path / "b.pth")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "d.npy", np.zeros(12))
    for name in ("a.npy", "b.pth", "c.npy", "d.npy"):
        with pytest.raises(CheckpointError):
            read_labels(tmp_path / name, 12, 3)


def test_a_split_is_made_once_per_weights(tmp_path, monkeypatch):
    keys = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    first = cached_labels(tmp_path, keys, 4)
    calls = []
    monkeypatch.setattr(label_cache, "split_keys", lambda *a, **k: calls.append(a) or split.split_keys(*a, **k))
    assert torch.equal(cached_labels(tmp_path, keys, 4), first) and not calls
    cached_labels(tmp_path, keys + 0.1, 4)
    assert len(calls) == 1 and len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert torch.equal(cached_labels(tmp_path, keys, 4), first) and len(calls) == 2
