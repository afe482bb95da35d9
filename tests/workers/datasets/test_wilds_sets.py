"""The five WILDS sets on generated stand-ins: splits by hand, domains, images, digests, the package's own view."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError
from tests.workers.datasets.wilds_sets import NAMES, copy_of, load, loaded, root_of
from workers.datasets.base import DATASETS

# By hand from the plans in the modules: see each `_generate`.
SPLITS = {
    "iwildcam": {"train": 12 * 24, "val": 3 * 20, "test": 4 * 20, "id_val": 12 * 3, "id_test": 12 * 3},
    "camelyon17": {"train": 30 * 12, "id_val": 30 * 2, "val": 10 * 8, "test": 10 * 8},
    "rxrx1": {"train": 6 * 28, "val": 2 * 28 * 2, "test": 3 * 28 * 2, "id_test": 6 * 28},
    "fmow": {  # 5 regions in full, half as many of "Other"
        "train": 11 * (5 * 5 + 2),
        "id_val": 5 * 6,
        "id_test": 6 * 6,
        "val": 3 * (5 * 5 + 2),
        "test": 2 * (5 * 8 + 4),
    },
    "poverty": {"train": 13 * 180 - 2000, "id_val": 1000, "id_test": 1000, "val": 5 * 180, "test": 5 * 180},
}
DOMAINS = {  # distinct values of the domain field in train, val, test
    "iwildcam": (12, 3, 4),
    "camelyon17": (30, 10, 10),
    "rxrx1": (6, 2, 3),
    "fmow": (11, 3, 2),
    "poverty": (13, 5, 5),
}


@pytest.mark.parametrize("name", NAMES)
def test_splits_and_domains(name):
    data = loaded(name)
    assert {split: len(rows) for split, rows in data.splits.items()} == SPLITS[name]
    seen = {split: set(data.column(data.info.domain_field, data.splits[split])) for split in ("train", "val", "test")}
    assert tuple(len(seen[split]) for split in ("train", "val", "test")) == DOMAINS[name]
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    rows = np.concatenate(list(data.splits.values()))
    assert len(rows) == len(set(rows)) <= len(data.labels) == len(data.images) == len(data.metadata)
    assert all((np.diff(rows) > 0).all() and rows.dtype == np.int64 for rows in data.splits.values())
    assert data.value_names["_miniature"] == ("yes",)
    source = data.column("from_source_domain")
    assert source[data.splits["train"]].all() and not source[data.splits["test"]].any()


@pytest.mark.parametrize("name", NAMES)
def test_record_fits_the_data(name):
    data = loaded(name)
    info, module = data.info, DATASETS.load(name)
    assert info is module.INFO and info.name == name
    assert set(info.group_fields) | {info.domain_field} <= set(data.fields)
    assert info.selection_metric in info.metrics
    assert data.metadata.dtype == np.int64
    assert data.labels.dtype == (np.float32 if info.task == "regression" else np.int64)
    if info.task == "multiclass":
        assert data.labels.min() >= 0 and data.labels.max() < info.num_outputs
        np.testing.assert_array_equal(data.column("y"), data.labels)
    assert module.missing(root_of(name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_package(name):
    from workers.wilds_compat import open_dataset

    data = loaded(name)
    official = open_dataset(name, str(root_of(name)))
    for row in (0, len(data.images) // 2, len(data.images) - 1):
        image = data.images[row]
        np.testing.assert_array_equal(image, np.asarray(official.get_input(row)))
        if name == "poverty":
            assert image.shape == (8, 224, 224) and image.dtype == np.float32
        else:
            assert image.dtype == np.uint8 and image.shape[2] == 3
            assert image.shape[:2] == data.info.image_size or (name == "iwildcam" and image.shape[0] == 448)
    np.testing.assert_array_equal(official.y_array.numpy().reshape(-1), data.labels)
    for field in data.fields:
        column = official.metadata_fields.index(field)
        np.testing.assert_array_equal(official.metadata_array[:, column].numpy(), data.column(field))


@pytest.mark.parametrize("name", NAMES)
def test_every_split_has_several_labels(name):
    data = loaded(name)
    for split, rows in data.splits.items():
        assert len(np.unique(data.labels[rows])) >= 2, split


def test_a_miniature_is_small_and_follows_from_its_seed(tmp_path):
    module = DATASETS.load("camelyon17")
    module.miniature(tmp_path / "again", 0)
    module.miniature(tmp_path / "other", 1)
    digest = loaded("camelyon17").digest
    assert load("camelyon17", tmp_path / "again").digest == digest
    assert load("camelyon17", tmp_path / "other").digest != digest
    module.miniature(tmp_path / "other", 0)  # replaces a generated set
    assert load("camelyon17", tmp_path / "other").digest == digest
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["camelyon17_v1.0"]


@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_takes_little_space(name):
    folder = root_of(name) / DATASETS.load(name).LAYOUT.folder
    stats = {stat.st_ino: stat.st_size for path in folder.rglob("*") if path.is_file() for stat in [path.stat()]}
    assert sum(stats.values()) < 10e6


def test_a_miniature_never_replaces_real_data(tmp_path):
    folder = copy_of("camelyon17", tmp_path)
    (folder / "MINIATURE.json").unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(DataError, match="was not generated"):
        DATASETS.load("camelyon17").miniature(tmp_path, 0)
    assert sorted(folder.rglob("*")) == before
    data = load("camelyon17", tmp_path)
    assert "_miniature" not in data.value_names and data.digest != loaded("camelyon17").digest


def test_labels_can_be_learned_and_domains_shift():
    """Tumour darkens the centre; hospitals differ in mean colour more than slides of one hospital do."""
    data = loaded("camelyon17")
    rows = np.arange(len(data.images))
    centre = np.array([data.images[int(row)][32:64, 32:64].mean() for row in rows])
    mean = np.array([data.images[int(row)].mean((0, 1)) for row in rows])
    hospital, slide = data.column("hospital"), data.column("slide")
    for number in range(5):
        mask = hospital == number
        assert centre[mask & (data.labels == 1)].mean() < centre[mask & (data.labels == 0)].mean() - 10
    between = np.array([mean[hospital == number].mean(0) for number in range(5)]).std(0).mean()
    within = np.mean(
        [mean[slide == number].mean(0) - mean[hospital == number // 10].mean(0) for number in range(50)], 0
    )
    assert between > np.abs(within).mean() + 3


@pytest.mark.parametrize("fold", "ABCDE")
def test_poverty_folds(fold):
    data = load("poverty", root_of("poverty"), fold=fold)
    countries = {split: set(data.column("country", data.splits[split])) for split in ("train", "val", "test")}
    assert len(countries["train"]) in (13, 14) and not countries["train"] & (countries["val"] | countries["test"])
    assert len(data.splits["train"]) == len(countries["train"]) * 180 - 2000
    assert len(countries["train"] | countries["val"] | countries["test"]) == 23
    assert (data.digest == loaded("poverty").digest) == (fold == "A")


def test_poverty_without_night_lights():
    dark = load("poverty", root_of("poverty"), night_lights=False)
    assert not dark.images[0][7].any() and loaded("poverty").images[0][7].any()
    assert dark.digest != loaded("poverty").digest
    np.testing.assert_array_equal(dark.images[0][:7], loaded("poverty").images[0][:7])


def test_fmow_numbering_counts_sequestered_rows():
    data = loaded("fmow")
    numbers = [int(name.rpartition("_")[2][:-4]) for name in data.images.names]
    dropped = set(range(max(numbers) + 1)) - set(numbers)
    assert len(numbers) + 6 == len(list((root_of("fmow") / "fmow_v1.1" / "images").iterdir()))
    assert 1 <= len(dropped) <= 6 and numbers == sorted(numbers)
    assert sorted(data.value_names["region"]) == ["Africa", "Americas", "Asia", "Europe", "Oceania", "Other"]
    in_splits = sum(map(len, data.splits.values()))
    assert len(data.labels) - in_splits == 6  # 2014 rows of the train column belong nowhere


def test_iwildcam_covers_remapped_ids():
    data = loaded("iwildcam")
    for field in ("location", "sequence"):
        assert set(data.column(field)) == set(range(data.column(field).max() + 1))
    assert data.value_names["y"][0] == "empty"
    assert Counter(data.labels.tolist()).most_common(1)[0][0] == 0


@pytest.mark.parametrize("name", NAMES)
def test_data_travels_to_workers(name):
    data = pickle.loads(pickle.dumps(loaded(name)))
    np.testing.assert_array_equal(data.images[1], loaded(name).images[1])


def test_sizes_are_asked_for_once(tmp_path, monkeypatch):
    from workers.datasets import _wilds_files, rxrx1

    folder = copy_of("rxrx1", tmp_path)
    walks = []
    walk = _wilds_files._walk

    def counted(folder, below, folders, sizes=True):
        if below == "images":
            walks.append(sizes)
        return walk(folder, below, folders, sizes)

    monkeypatch.setattr(_wilds_files, "_walk", counted)
    planned = rxrx1.fingerprint(tmp_path, rxrx1.Options())
    first = load("rxrx1", tmp_path)
    assert walks == [True, False]  # the second time only names, to find what is missing
    assert load("rxrx1", tmp_path).digest == first.digest
    assert rxrx1.fingerprint(tmp_path, rxrx1.Options()) == planned
    assert len(walks) == 2
    kept = folder / ".moepipe_files.json"
    for damaged in ("", "[]", "{}", json.dumps(json.loads(kept.read_text()) | {"tables": "other"})):
        kept.write_text(damaged)
        assert load("rxrx1", tmp_path).digest == first.digest


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_follows_the_files(name, tmp_path):
    module = DATASETS.load(name)
    folder = copy_of(name, tmp_path)
    here = module.fingerprint(root_of(name), module.Options())
    assert here == module.fingerprint(tmp_path, module.Options())
    before = load(name, tmp_path)
    path = folder / before.images.names[5]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"\0")
    assert module.fingerprint(tmp_path, module.Options()) != here
    assert load(name, tmp_path).digest != before.digest
    path.unlink()
    with pytest.raises(DataError, match="image is missing of the"):
        load(name, tmp_path)
    path.write_bytes(content)
    assert module.fingerprint(tmp_path, module.Options()) == here
    assert load(name, tmp_path).digest == before.digest
    with pytest.raises(NotFoundError):
        module.fingerprint(tmp_path / "elsewhere", module.Options())


def test_the_folder_may_lie_below_wilds(tmp_path):
    copy_of("camelyon17", tmp_path / "wilds")
    assert load("camelyon17", tmp_path).digest == loaded("camelyon17").digest
