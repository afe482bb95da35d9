"""Generated WILDS sets shared by the tests: each is written once per test session and copied by hard links."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from workers.datasets.base import DATASETS, DomainData

NAMES = ("iwildcam", "camelyon17", "rxrx1", "fmow", "poverty")


@cache
def root_of(name: str) -> Path:
    """A data root that holds the generated set ``name`` (seed 0)."""
    root = Path(tempfile.mkdtemp(prefix=f"moepipe-{name}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    DATASETS.load(name).miniature(root, 0)
    return root


@cache
def loaded(name: str) -> DomainData:
    """The set with default options."""
    return load(name, root_of(name))


def load(name: str, root: Path, **options: object) -> DomainData:
    module = DATASETS.load(name)
    return module.load(root, module.Options(**options))


def copy_of(name: str, root: Path) -> Path:
    """Hard-linked copy of the set below ``root``; returns its folder. Replace files in it, don't write into them."""
    folder = DATASETS.load(name).LAYOUT.folder
    shutil.copytree(root_of(name) / folder, root / folder, copy_function=os.link)
    (root / folder / ".moepipe_files.json").unlink(missing_ok=True)
    return root / folder


def replace(path: Path, content: bytes | str) -> None:
    """Give ``path`` a new content without touching files it is linked with."""
    path.unlink()
    if isinstance(content, str):
        path.write_text(content)
    else:
        path.write_bytes(content)
