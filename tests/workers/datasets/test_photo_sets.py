"""Sets in torchvision's layouts: torchvision reads the generated ones the same way, and damage is named."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from moe.errors import DataError, NotFoundError, SpecError
from workers import catalogue
from workers.data import load_data
from workers.datasets import imagenet
from workers.datasets._wilds import MARKER
from workers.datasets.base import DomainData

TORCHVISION = {
    "flowers102": ("Flowers102", ("train", "val", "test")),
    "oxford_pets": ("OxfordIIITPet", ("trainval", "test")),
    "dtd": ("DTD", ("train", "val", "test")),
    "food101": ("Food101", ("train", "test")),
    "svhn": ("SVHN", ("train", "test")),
    "stl10": ("STL10", ("train", "test")),
}
NAMES = [*TORCHVISION, "imagenet", "imagenet21k"]
FOLDERS = {
    "flowers102": "flowers-102",
    "oxford_pets": "oxford-iiit-pet",
    "food101": "food-101",
    "stl10": "stl10_binary",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A data root with the stand-in of every set."""
    root = tmp_path_factory.mktemp("sets")
    for name in NAMES:
        catalogue.miniature(name, root, seed=1)
    return root


@pytest.fixture
def copy(made, tmp_path, request) -> Path:
    """A root with a copy of one set, that a test may damage."""
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else request.node.name
    folder = next(FOLDERS.get(own, own) for own in sorted(NAMES, key=len, reverse=True) if own in name)
    shutil.copytree(made / folder, tmp_path / "root" / folder, ignore=shutil.ignore_patterns(".moepipe*"))
    return tmp_path / "root"


def read_by_torchvision(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, int]]:
    """All images and classes, in the order of the official splits."""
    from torchvision import datasets

    kind, splits = TORCHVISION[name]
    if name in ("flowers102", "svhn"):  # they compare checksums of the official files
        monkeypatch.setattr(f"torchvision.datasets.{name}.check_integrity", lambda *a, **k: True)
    if name == "stl10":
        monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    place = root / "svhn" if name == "svhn" else root
    sets = [getattr(datasets, kind)(str(place), split=split) for split in splits]
    return [(np.asarray(image.convert("RGB")), int(label)) for own in sets for image, label in own]


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_layout_is_torchvisions(name, made, monkeypatch):
    theirs = read_by_torchvision(name, made, monkeypatch)
    ours = load_data(name, {}, made)
    assert len(ours.images) == len(theirs)
    assert ours.labels.tolist() == [label for _, label in theirs]
    for row in range(0, len(theirs), 23):
        assert np.array_equal(ours.images[row], theirs[row][0])


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_verifies_and_covers_its_splits(name, made):
    found = catalogue.verify(name, made)
    assert found.ok, found.checks
    data = load_data(name, {}, made)
    assert "_miniature" in data.value_names
    rows = np.concatenate([data.splits[split] for split in ("train", "val", "test")])
    assert np.array_equal(np.sort(rows), np.arange(len(data.labels)))  # disjoint and complete
    assert all(len(data.splits[split]) for split in data.splits)
    assert len(np.unique(data.labels)) == (12 if name.startswith("imagenet") else data.info.num_outputs)
    assert data.digest == load_data(name, {}, made).digest


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_listed_with_the_command(name, tmp_path):
    with pytest.raises(NotFoundError, match="missing") as caught:
        load_data(name, {}, tmp_path)
    assert f"moepipe data import {name}" in caught.value.hint and f"data miniature {name}" in caught.value.hint
    assert not catalogue.verify(name, tmp_path).ok


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_linked_and_an_archive_unpacked(name, made, tmp_path):
    inner = made / FOLDERS.get(name, name)
    catalogue.import_archive(name, inner, tmp_path / "linked")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(inner, "wrapped/set")
    catalogue.import_archive(name, tmp_path / "set.tar", tmp_path / "unpacked")
    sets = [load_data(name, {}, root) for root in (made, tmp_path / "linked", tmp_path / "unpacked")]
    assert len({own.digest for own in sets}) == 1
    with pytest.raises(DataError, match="exists already"):
        catalogue.import_archive(name, inner, tmp_path / "linked")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"is not {name}"):
        catalogue.import_archive(name, tmp_path / "empty", tmp_path / "other")


@pytest.mark.parametrize("name", ["flowers102", "oxford_pets", "dtd", "food101", "svhn", "stl10", "imagenet"])
def test_a_set_that_is_not_marked_as_generated_must_be_whole(name, copy):
    for marker in copy.rglob(MARKER):
        marker.unlink()
    with pytest.raises(DataError, match=r"not 1,020|not 3,680|not 1,880|not 75,750|73257|5,000 images|be 50,000"):
        load_data(name, {}, copy)


@pytest.mark.parametrize("name", ["flowers102", "oxford_pets", "dtd", "food101", "imagenet"])
def test_a_lost_or_damaged_image_is_named(name, copy):
    data = load_data(name, {}, copy)
    path = data.images.folder / data.images.names[-1]  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=path.name):
        load_data(name, {}, copy).images[len(data.images) - 1]
    assert not catalogue.verify(name, copy, sample=None).ok
    path.unlink()
    with pytest.raises(DataError, match=path.name if name != "imagenet" else "47 images and"):
        load_data(name, {}, copy)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("name", "table", "harm", "words"),
    [
        ("flowers102", "flowers-102/setid.mat", cut, "setid.mat is damaged"),
        ("flowers102", "flowers-102/imagelabels.mat", lambda p: savemat(p, {"x": 1}), "holds no labels"),
        ("flowers102", "flowers-102/imagelabels.mat", lambda p: savemat(p, {"labels": [1, 2]}), "has 2 images"),
        ("oxford_pets", "oxford-iiit-pet/annotations/test.txt", lambda p: p.write_text("Bengal_1 x 1 1"), "line 1"),
        ("oxford_pets", "oxford-iiit-pet/annotations/test.txt", lambda p: p.write_text("Pug_1 1 1 1"), "is 'Pug'"),
        ("dtd", "dtd/dtd/labels/train1.txt", lambda p: p.write_text("../../x.jpg"), "is not `class/image.jpg`"),
        ("dtd", "dtd/dtd/labels/val1.txt", lambda p: p.write_text("odd/x.jpg"), "has 48 classes"),
        ("food101", "food-101/meta/test.json", cut, "no JSON table"),
        ("food101", "food-101/meta/test.json", lambda p: p.write_text(json.dumps({"a": ["b/1"]})), "map a class"),
        ("svhn", "svhn/test_32x32.mat", cut, "test_32x32.mat is damaged"),
        ("stl10", "stl10_binary/test_X.bin", cut, "expected"),
        ("stl10", "stl10_binary/test_y.bin", lambda p: p.write_bytes(b"\x0b" * 40), "classes reach"),
        ("imagenet", f"imagenet/{imagenet.TRUTH}", lambda p: p.write_text("77\n" * 48), "do not fit"),
        ("imagenet", f"imagenet/{imagenet.META}", cut, "meta.mat is damaged"),
    ],
)  # fmt: skip
def test_damaged_tables_are_named(name, table, harm, words, copy):
    harm(copy / table)
    with pytest.raises(DataError, match=words):
        load_data(name, {}, copy)


def test_the_digit_0_has_the_class_10_in_files(made):
    data = load_data("svhn", {}, made)
    files = [loadmat(made / "svhn" / f"{split}_32x32.mat")["y"].ravel() for split in ("train", "test")]
    assert data.labels.tolist() == [int(c) % 10 for c in np.concatenate(files)]


def test_the_partitions_of_dtd_share_images_and_differ_in_splits(made):
    one, two = (load_data("dtd", {"partition": number}, made) for number in (1, 2))
    assert sorted(one.images.names) == sorted(two.images.names)  # type: ignore[attr-defined]
    assert one.digest != two.digest
    with pytest.raises(SpecError, match="partition"):
        load_data("dtd", {"partition": 11}, made)


def by_name(data: DomainData) -> dict[str, int]:
    names = [Path(name).name for name in data.images.names]  # type: ignore[attr-defined]
    return dict(zip(names, data.labels.tolist(), strict=True))


def test_validation_images_of_imagenet_flat_listed_or_in_class_folders(copy):
    flat = load_data("imagenet", {}, copy)
    folder = copy / "imagenet"
    pairs = {name: flat.value_names["y"][label] for name, label in by_name(flat).items() if "val" in name}
    (folder / imagenet.SYNSETS).write_text("".join(f"{pairs[name]}\n" for name in sorted(pairs)))
    shutil.rmtree(folder / "ILSVRC2012_devkit_t12")
    assert by_name(load_data("imagenet", {}, copy)) == by_name(flat)
    (folder / imagenet.SYNSETS).unlink()
    with pytest.raises(NotFoundError, match="classes of the flat folder"):
        load_data("imagenet", {}, copy)
    for name, wnid in pairs.items():
        (folder / "val" / wnid).mkdir(exist_ok=True)
        (folder / "val" / name).rename(folder / "val" / wnid / name)
    assert by_name(load_data("imagenet", {}, copy)) == by_name(flat)
    (folder / "val" / "n00000000").mkdir()
    with pytest.raises(DataError, match="n00000000"):
        load_data("imagenet", {}, copy)


def test_imagenet21k_takes_its_classes_from_the_folders(copy):
    data = load_data("imagenet21k", {"test_fraction": 0.1}, copy)
    assert data.info.num_outputs == 12 and len(data.splits["test"]) == 24
    folder = copy / "imagenet21k"
    (folder / "train").mkdir()
    for place in [place for place in folder.iterdir() if place.name.startswith("n")]:
        place.rename(folder / "train" / place.name)
    (folder / "val").mkdir()
    for place in sorted((folder / "train").iterdir())[:2]:
        (folder / "val" / place.name).mkdir()
        picture = next(place.iterdir())
        picture.rename(folder / "val" / place.name / picture.name)
    data = load_data("imagenet21k", {}, copy)
    assert data.info.num_outputs == 12 and len(data.splits["test"]) == 2
    with pytest.raises(SpecError, match=r"test_fraction=0\.1 has no effect"):
        load_data("imagenet21k", {"test_fraction": 0.1}, copy)
