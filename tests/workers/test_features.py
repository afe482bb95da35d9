"""Cached features: exact, resumable, read in place; images by row whatever the threads."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from moe.errors import CheckpointError, DataError, EnvironmentProblem, Interrupted, NotFoundError
from tests.workers.test_loop import Recorder
from workers.batches import ImageReader, Prefetcher
from workers.features import FeatureTable, write_features
from workers.transforms import Transform, TransformSpec

RNG = np.random.default_rng(0)
ARRAY = RNG.integers(0, 256, size=(40, 5, 5, 3), dtype=np.uint8)
PLAIN = Transform(TransformSpec(normalisation="unit"))
RANDOM = Transform(TransformSpec(normalisation="instance", augment=True))
WEIGHT = torch.randn(75, 6, generator=torch.Generator().manual_seed(1))


class Decoded:
    """Images that are decoded on access and count how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return len(ARRAY)

    def __getitem__(self, row: int):
        self.calls += 1
        return ARRAY[row]


def extractor(images):
    return images.flatten(1) @ WEIGHT


def write(path, transform=PLAIN, rows=None, reporter=None, **extra):
    rows = np.arange(40) if rows is None else rows
    arguments = {"batch_size": 7, "images": Decoded(), **extra}
    images, size = arguments.pop("images"), arguments.pop("batch_size")
    return write_features(extractor, images, rows, transform, path, size, reporter or Recorder(), **arguments)


def expected(rows, transform=PLAIN):
    return extractor(transform.batch(ARRAY[rows]))


def test_tokens_are_the_features_of_the_rows_asked_for(tmp_path):
    rows = np.array([39, 3, 5, 3])
    record = write(tmp_path / "a", rows=np.array([5, 3, 39, 8]))
    write(tmp_path / "b", rows=np.array([3, 5, 8, 39]))
    assert record.dim == 6 and record.variants == 1 and record.dtype == "float32"
    table = FeatureTable([tmp_path / "a", tmp_path / "b"])
    tokens = table.tokens(rows)
    assert tokens.shape == (4, 2, 6) and tokens.dtype == torch.float32
    for expert in (0, 1):
        torch.testing.assert_close(tokens[:, expert], expected(rows), rtol=1e-6, atol=1e-5)
    assert table.covers(rows) and not table.covers(np.array([4]))


def test_every_variant_of_a_random_transform_is_stored(tmp_path):
    write(tmp_path, RANDOM)
    table = FeatureTable([tmp_path])
    rows, variants = np.array([1, 1, 2, 9]), np.array([0, 5, 7, 3])
    tokens = table.tokens(rows, variants)
    assert table.variants == 8
    for place, (row, variant) in enumerate(zip(rows, variants, strict=True)):
        torch.testing.assert_close(tokens[place, 0], expected([row], RANDOM.fixed(int(variant)))[0])


def test_half_precision_halves_the_file_and_rounds(tmp_path):
    write(tmp_path / "f32")
    write(tmp_path / "f16", dtype="float16")
    small, large = ((tmp_path / n / "features.npy").stat().st_size for n in ("f16", "f32"))
    assert small < 0.6 * large
    tokens = FeatureTable([tmp_path / "f16"]).tokens(np.arange(40))[:, 0]
    torch.testing.assert_close(tokens, expected(np.arange(40)), rtol=1e-3, atol=1e-3)


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path):
    scratch, images = tmp_path / "scratch", Decoded()
    with pytest.raises(Interrupted):
        write(tmp_path / "out", batch_size=1, images=images, scratch=scratch, reporter=Recorder(stop_after=2))
    assert images.calls == 32 and not (tmp_path / "out" / "features.json").exists()
    write(tmp_path / "out", batch_size=1, images=images, scratch=scratch)
    assert images.calls == 40
    write(tmp_path / "whole", batch_size=1)
    for name in ("features.npy", "rows.npy", "features.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["features.json", "features.npy", "rows.npy"]


def test_a_leftover_of_other_settings_is_not_continued(tmp_path):
    with pytest.raises(Interrupted):
        write(tmp_path, batch_size=1, reporter=Recorder(stop_after=1))
    images = Decoded()
    write(tmp_path, batch_size=2, images=images)
    assert images.calls == 40


def test_tokens_are_read_in_place(tmp_path):
    write(tmp_path)
    table = FeatureTable([tmp_path])
    assert isinstance(table._arrays[0], np.memmap)


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a")
    write(tmp_path / "b", rows=np.arange(10))
    write(tmp_path / "c", dtype="float16")
    with pytest.raises(DataError, match=r"do not hold 1 of the rows asked for .first: 99"):
        FeatureTable([tmp_path / "a"]).tokens(np.array([3, 99]))
    with pytest.raises(CheckpointError, match="different rows"):
        FeatureTable([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(CheckpointError, match="differ in width"):
        FeatureTable([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(NotFoundError, match="no finished features"):
        FeatureTable([tmp_path / "nowhere"])
    (tmp_path / "a" / "features.json").write_text(json.dumps({"dim": 1}))
    with pytest.raises(CheckpointError, match="damaged"):
        FeatureTable([tmp_path / "a"])
    with pytest.raises(DataError, match="no rows"):
        write(tmp_path / "d", rows=np.array([], dtype=np.int64))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(EnvironmentProblem, match="float16"):
        write(tmp_path / "e")


def test_threads_do_not_change_what_is_read():
    rows = RNG.integers(0, 40, size=30)
    alone, threaded = ImageReader(Decoded(), PLAIN), ImageReader(Decoded(), PLAIN, threads=3)
    assert torch.equal(alone.read(rows), threaded.read(rows))
    threaded.close()


def test_decoded_images_are_kept_up_to_the_budget():
    images = Decoded()
    reader = ImageReader(images, PLAIN, budget=3 * ARRAY[0].nbytes)
    reader.read(np.arange(5))
    reader.read(np.arange(5))
    assert images.calls == 5 + 2


def test_images_in_memory_are_read_in_one_slice():
    class InMemory:
        array = ARRAY

        def __getitem__(self, row):
            raise RuntimeError("decoded one by one")

    reader = ImageReader(InMemory(), RANDOM)
    rows = np.arange(6)
    variants = reader.draw(6, np.random.default_rng(0))
    got = reader.read(rows, variants)
    for place in rows:
        assert torch.equal(got[place], RANDOM.fixed(int(variants[place])).batch(ARRAY[[place]])[0])
    assert ImageReader(InMemory(), PLAIN).draw(6, np.random.default_rng(0)) is None


def test_prefetching_keeps_order_and_passes_errors_on():
    def make(step):
        if step == 3:
            raise DataError("broken.png is corrupt.")
        return step * step

    ahead = Prefetcher(make, steps=5, depth=2)
    assert [ahead(0), ahead(1), ahead(2)] == [0, 1, 4]
    with pytest.raises(DataError, match=r"broken\.png"):
        ahead(3)
    assert ahead(4) == 16 and ahead(1) == 1
    ahead.close()
