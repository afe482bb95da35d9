"""Importing an official archive: complete or not at all, and never a path outside the data root."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile

import pytest

from moe.errors import DataError, NotFoundError
from tests.workers.datasets.wilds_sets import load, loaded, root_of
from workers.datasets import camelyon17

FOLDER = camelyon17.LAYOUT.folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """As WILDS ships it: the files at the top of a tar.gz."""
    path = tmp_path_factory.mktemp("archive") / "archive.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as packed:
        for child in sorted((root_of("camelyon17") / FOLDER).iterdir()):
            if not child.name.startswith("."):
                packed.add(child, child.name)
    return path


def empty(root):
    return not root.exists() or not list(root.iterdir())


def test_tar(archive, tmp_path):
    assert camelyon17.import_archive(tmp_path / "data", archive) == tmp_path / "data" / FOLDER
    assert load("camelyon17", tmp_path / "data").digest == loaded("camelyon17").digest
    with pytest.raises(DataError, match="exists already"):
        camelyon17.import_archive(tmp_path / "data", archive)


def test_zip_with_the_folder_inside(tmp_path):
    base = shutil.make_archive(str(tmp_path / "set"), "zip", root_of("camelyon17"), FOLDER)
    camelyon17.import_archive(tmp_path / "data", tmp_path / os.path.basename(base))
    assert load("camelyon17", tmp_path / "data").digest == loaded("camelyon17").digest


def test_a_folder_is_linked(tmp_path):
    target = camelyon17.import_archive(tmp_path, root_of("camelyon17"))
    assert target.is_symlink() and load("camelyon17", tmp_path).digest == loaded("camelyon17").digest


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_truncated(archive, tmp_path, keep):
    short = tmp_path / "short.tar.gz"
    short.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"short\.tar\.gz"):
        camelyon17.import_archive(tmp_path / "data", short)
    assert empty(tmp_path / "data")


def test_another_set(archive, tmp_path):
    from workers.datasets import fmow

    with pytest.raises(DataError, match=r"is not the fmow set: rgb_metadata\.csv is not at its top"):
        fmow.import_archive(tmp_path, archive)
    assert empty(tmp_path)


def test_not_there(tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        camelyon17.import_archive(tmp_path, tmp_path / "nothing.tar.gz")


@pytest.mark.parametrize("name", ["../evil", "/tmp/moepipe-evil"])
def test_paths_that_lead_outside(tmp_path, name):
    tar, packed = tmp_path / "evil.tar", tmp_path / "evil.zip"
    with tarfile.open(tar, "w") as out:
        entry = tarfile.TarInfo(name if name.startswith("..") else "link")
        if not name.startswith(".."):
            entry.type, entry.linkname = tarfile.SYMTYPE, name
        out.addfile(entry, io.BytesIO())
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr(name, "x")
    for archive in (tar, packed):
        with pytest.raises(DataError, match="nothing was imported"):
            camelyon17.import_archive(tmp_path / "data", archive)
        assert empty(tmp_path / "data") and not (tmp_path / "evil").exists()
