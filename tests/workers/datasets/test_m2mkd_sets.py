"""Tiny-ImageNet, its renditions, ImageNet-R and CUB: official layouts, splits, and what is said of damaged ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError
from workers import catalogue
from workers.data import load_data
from workers.datasets._class_lists import class_lists
from workers.datasets._wilds import MARKER
from workers.m2mkd_evaluate import shared_classes

FOLDERS = {
    "tiny_imagenet": "tiny-imagenet-200",
    "tiny_imagenet_r": "tiny-imagenet-r",
    "imagenet_r": "imagenet-r",
    "cub200": "CUB_200_2011",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name in FOLDERS:
        catalogue.miniature(name, root, seed=1)
    return root


@pytest.fixture
def copy(made, tmp_path, request) -> Path:
    """A root with a copy of one set, that a test may damage."""
    folder = FOLDERS[request.node.callspec.params["name"]]
    shutil.copytree(made / folder, tmp_path / folder, ignore=shutil.ignore_patterns(".moepipe_index*"))
    return tmp_path


@pytest.mark.parametrize("name", FOLDERS)
def test_a_stand_in_verifies_and_can_be_taken_in(name, made, tmp_path):
    assert catalogue.verify(name, made).ok
    data = load_data(name, {}, made)
    assert "_miniature" in data.value_names and data.images[0].shape[2] == 3
    rows = np.sort(np.concatenate(list(data.splits.values())))
    assert np.array_equal(rows, np.arange(len(data.labels)))
    catalogue.import_archive(name, made / FOLDERS[name], tmp_path / "linked")
    assert load_data(name, {}, tmp_path / "linked").digest == data.digest
    with pytest.raises(NotFoundError, match="missing") as caught:
        load_data(name, {}, tmp_path)
    assert f"moepipe data import {name}" in caught.value.hint and f"data miniature {name}" in caught.value.hint


@pytest.mark.parametrize("name", FOLDERS)
def test_a_set_that_is_not_marked_as_generated_must_be_whole(name, copy):
    for marker in copy.rglob(MARKER):
        marker.unlink()
    with pytest.raises(DataError, match=r"12 class folders|56 of 62|19. of 200|not 5,994"):
        load_data(name, {}, copy)


@pytest.mark.parametrize("name", ["tiny_imagenet"])
def test_annotated_and_sorted_validation_images_are_the_same(name, copy, made):
    annotated = load_data(name, {}, made)
    folder = copy / FOLDERS[name] / "val"
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        file, wnid = line.split("\t")[:2]
        (folder / wnid).mkdir(exist_ok=True)
        (folder / "images" / file).rename(folder / wnid / file)
    (folder / "images").rmdir()
    both = [load_data(name, {}, root) for root in (made, copy)]
    tests = [
        {(data.images.names[r].rpartition("/")[2], int(data.labels[r])) for r in data.splits["test"]} for data in both
    ]  # type: ignore[attr-defined]
    assert tests[0] == tests[1] and len(tests[0]) == len(annotated.splits["test"]) == 48


@pytest.mark.parametrize("name", ["tiny_imagenet"])
def test_annotations_that_do_not_fit_are_refused(name, copy):
    table = copy / FOLDERS[name] / "val/val_annotations.txt"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DataError, match=r"has 47 lines .0 without a class.*48 images; 1 names"):
        load_data(name, {}, copy)
    table.write_text("\n".join([*lines[1:], lines[0].replace("\t", " ", 1).split("\t")[0]]) + "\n")
    with pytest.raises(DataError, match="1 without a class"):
        load_data(name, {}, copy)


@pytest.mark.parametrize("name", ["tiny_imagenet", "tiny_imagenet_r", "imagenet_r"])
def test_foreign_class_folders_are_named(name, copy):
    inner = copy / FOLDERS[name] / ("train" if name == "tiny_imagenet" else ".")
    first = next(path for path in sorted(inner.iterdir()) if path.is_dir())
    shutil.copytree(first, inner / "n99999999")
    with pytest.raises(DataError, match=r"1 of them of other sets|1 class folders do not belong there .n99999999"):
        load_data(name, {}, copy)


@pytest.mark.parametrize("name", ["cub200"])
def test_tables_of_different_lengths_are_refused(name, copy):
    table = copy / FOLDERS[name] / "image_class_labels.txt"
    table.write_text("".join(line + "\n" for line in table.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="288 images, 287 classes and 288 parts"):
        load_data(name, {}, copy)


def test_renditions_find_their_columns_by_name(made):
    whole, part = (load_data(name, {}, made) for name in ("tiny_imagenet", "tiny_imagenet_r"))
    columns = shared_classes(whole, part)
    names = whole.value_names["y"]
    assert [names[c] for c in columns] == list(part.value_names["y"]) and len(columns) == 6
    assert set(class_lists()["tiny-imagenet-r"]) <= set(class_lists()["tiny-imagenet-200"])
    with pytest.raises(
        DataError, match=r"tiny_imagenet has the classes .*which tiny_imagenet_r does not know .6 of 12"
    ):
        shared_classes(part, whole)
