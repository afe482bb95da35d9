"""Broken WILDS folders: every message names the file, the column and the fix; pandas is never quoted as a traceback."""

from __future__ import annotations

import os
import shutil

import pandas as pd
import pytest

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from tests.workers.datasets.wilds_sets import NAMES, copy_of, load, loaded, replace
from workers.datasets._decode import broken_images
from workers.datasets.base import DATASETS


def rewrite(path, change):
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    replace(path, change(frame).to_csv(index=False))


def with_cell(column, value, row=4):
    def change(frame):
        frame.loc[row, column] = value
        return frame

    return change


@pytest.mark.parametrize("name", NAMES)
def test_nothing_there(name, tmp_path):
    module = DATASETS.load(name)
    (gone,) = module.missing(tmp_path)
    assert str(tmp_path / module.LAYOUT.folder) in gone.what
    assert f"moepipe data import {name}" in gone.fix and f"moepipe data miniature {name}" in gone.fix
    with pytest.raises(NotFoundError, match=module.LAYOUT.folder) as caught:
        load(name, tmp_path)
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_missing(name, tmp_path):
    layout = DATASETS.load(name).LAYOUT
    folder = copy_of(name, tmp_path)
    for part in (layout.tables[0], layout.release):
        content = (folder / part).read_bytes()
        (folder / part).unlink()
        with pytest.raises(NotFoundError, match=part):
            load(name, tmp_path)
        (folder / part).write_bytes(content)
    shutil.rmtree(folder / layout.images)
    with pytest.raises(NotFoundError, match=f"image folder .*{layout.images}"):
        load(name, tmp_path)


COLUMNS = {
    "iwildcam": ("split", "filename", "y", "location_remapped", "sequence_remapped", "datetime"),
    "camelyon17": ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"),
    "rxrx1": ("dataset", "experiment", "plate", "well", "site", "cell_type", "sirna_id"),
    "fmow": ("split", "category", "country_code", "timestamp"),
    "poverty": ("country", "wealthpooled", "urban"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_column_is_missing(name, tmp_path):
    folder = copy_of(name, tmp_path)
    table = folder / DATASETS.load(name).LAYOUT.tables[0]
    whole = table.read_text()
    for column in COLUMNS[name]:
        rewrite(table, lambda frame, column=column: frame.drop(columns=column))
        with pytest.raises(DataError, match=f"{table.name}: column '{column}' missing"):
            load(name, tmp_path)
        replace(table, whole)


BAD_CELLS = [
    ("iwildcam", "split", "trian", "Did you mean 'train'"),
    ("iwildcam", "datetime", "2013-01-01 10:00:00", "expected text like"),
    ("iwildcam", "datetime", "2013-13-01 10:00:00.000", "expected a date and time"),
    ("iwildcam", "filename", "../../secret.jpg", "expected text like"),
    ("iwildcam", "y", "cat", "expected a whole number"),
    ("iwildcam", "y", "7", "1 never occurs: 6"),
    ("iwildcam", "location_remapped", "25", "6 never occur: 19, 20, 21, 22, 23, ..."),
    ("camelyon17", "tumor", "2", "expected a whole number from 0 to 1"),
    ("camelyon17", "patient", "../x", "expected text like '004'"),
    ("camelyon17", "center", "", "found 'nan'"),
    ("rxrx1", "dataset", "valid", "expected one of 3 names"),
    ("rxrx1", "site", "3", "expected a whole number from 1 to 2"),
    ("rxrx1", "sirna_id", "1139", "from 0 to 1138"),
    ("rxrx1", "experiment", "../../etc-01", "expected text like 'HEPG2-01'"),
    ("fmow", "category", "airprt", "Did you mean 'airport'"),
    ("fmow", "timestamp", "2010-02-30T00:00:00Z", "expected a date and time"),
    ("fmow", "timestamp", "1999-02-01T00:00:00Z", "a year from 2002 to 2017"),
    ("poverty", "country", "atlantis", "expected one of 23 names"),
    ("poverty", "wealthpooled", "", "expected a finite number"),
    ("poverty", "urban", "maybe", "expected a whole number from 0 to 1"),
]


@pytest.mark.parametrize(("name", "column", "value", "words"), BAD_CELLS)
def test_a_bad_cell(name, column, value, words, tmp_path):
    folder = copy_of(name, tmp_path)
    table = folder / DATASETS.load(name).LAYOUT.tables[0]
    rewrite(table, with_cell(column, value))
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    text = str(caught.value)
    assert words in text and table.name in text and f"column '{column}'" in text
    if "never" not in words:
        assert "line 6" in text
    assert "Traceback" not in text and "\n" not in caught.value.message


@pytest.mark.parametrize("content", ["", "split\n", "\0\xff,\n1,2,3\n4", 'a,"b\n1'])
def test_not_a_table(content, tmp_path):
    folder = copy_of("fmow", tmp_path)
    replace(folder / "rgb_metadata.csv", content)
    with pytest.raises(DataError, match=r"rgb_metadata\.csv"):
        load("fmow", tmp_path)


def test_a_split_is_empty(tmp_path):
    folder = copy_of("camelyon17", tmp_path)
    rewrite(folder / "metadata.csv", lambda frame: frame[frame["center"] != "1"])
    with pytest.raises(DataError, match="no row belongs to split 'val'"):
        load("camelyon17", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_broken_images(name, tmp_path):
    folder = copy_of(name, tmp_path)
    data = load(name, tmp_path)
    first, second, third = (folder / data.images.names[row] for row in (0, 1, 2))
    replace(first, b"not an image at all")
    replace(second, second.read_bytes()[: second.stat().st_size // 2])
    third.unlink()
    for row, path, word in ((0, first, "cannot be decoded"), (1, second, "cannot be decoded"), (2, third, "missing")):
        with pytest.raises(DataError, match=word) as caught:
            data.images[row]
        assert str(path) in caught.value.message and caught.value.exit_code == 6
    broken = [error.message for error in broken_images(data)]
    assert len(broken) == 3 and str(first) in broken[0] and str(second) in broken[1] and str(third) in broken[2]
    assert len(broken_images(data, most=2)) == 2
    with pytest.raises(DataError, match=r"image is missing") as caught:  # found at the next load
        load(name, tmp_path)
    assert str(third) in str(caught.value)


def test_an_image_of_another_size(tmp_path):
    from PIL import Image

    folder = copy_of("rxrx1", tmp_path)
    data = load("rxrx1", tmp_path)
    path = folder / data.images.names[0]
    path.unlink()
    Image.new("RGB", (128, 256)).save(path)
    with pytest.raises(DataError, match="is 128 x 256 pixels, expected 256 x 256"):
        data.images[0]


def test_a_poverty_file_that_would_run_code_is_refused(tmp_path):
    import numpy as np

    folder = copy_of("poverty", tmp_path)
    data = load("poverty", tmp_path)
    path = folder / data.images.names[0]
    path.unlink()
    np.savez(path, x=np.array([print], dtype=object))
    with pytest.raises(DataError, match="cannot be decoded"):
        data.images[0]
    path.unlink()
    np.savez(path, x=np.zeros((3, 224, 224), np.float32))
    with pytest.raises(DataError, match=r"shape \[3, 224, 224\], expected \[8, 224, 224\]"):
        data.images[0]


def test_a_file_in_the_place_of_the_data_root(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises((EnvironmentProblem, OSError)):
        DATASETS.load("camelyon17").miniature(tmp_path / "data", 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_root(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentProblem, match="Permission denied"):
        DATASETS.load("camelyon17").miniature(tmp_path, 0)


def test_a_failed_miniature_leaves_nothing(tmp_path, monkeypatch):
    import errno

    from workers.datasets import camelyon17

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(camelyon17.paint, "write_csv", full)
    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        camelyon17.miniature(tmp_path, 0)
    assert not list(tmp_path.iterdir())
    assert loaded("camelyon17").digest  # the shared one is untouched
