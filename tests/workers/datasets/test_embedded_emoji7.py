from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError
from workers.datasets import emoji7


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Small icon files of our own making in the layout of the packages."""
    checksums = []
    icons = {
        f"icon-{kind}-{i}": f'<circle cx="16" cy="16" r="{4 + i}" fill="#{kind * 30:02x}8040"/>'
        for kind in range(7)
        for i in range(5)
    }
    for name in emoji7.DOMAINS:
        folder = tmp_path / "iconify" / name
        folder.mkdir(parents=True)
        table = {"width": 32, "height": 32, "icons": {key: {"body": body} for key, body in icons.items()}}
        table["icons"]["other"] = {"body": ""}
        content = json.dumps(table).encode()
        (folder / "icons.json").write_bytes(content)
        checksums.append(hashlib.sha256(content).hexdigest())
    kinds = {kind: [f"icon-{k}-{i}" for i in range(5)] for k, kind in enumerate(emoji7.CLASSES)} | {"Flags": ["other"]}
    (tmp_path / "iconify" / "noto" / "metadata.json").write_text(json.dumps({"categories": kinds}))
    monkeypatch.setattr(emoji7, "_CHECKSUMS", tuple(checksums))
    return tmp_path


def test_missing_packages_name_their_commands(tmp_path):
    gaps = emoji7.missing(tmp_path)
    assert len(gaps) >= 6 and any("npm pack @iconify-json/openmoji@1.2.29" in gap.fix for gap in gaps)
    with pytest.raises(NotFoundError, match="icons of noto"):
        emoji7.load(tmp_path, emoji7.Options())


def test_names_and_artists_are_held_out(root):
    pytest.importorskip("resvg_py", reason="emoji7 needs resvg-py")
    data = emoji7.load(root, emoji7.Options(target="noto"))
    assert len(data.labels) == 6 * 35 and data.images[0].shape == (32, 32, 3)
    assert data.images.array[0, 0, 0].tolist() == [255, 255, 255]  # white background
    assert data.images.array[0, 16, 16].tolist() == [0, 0x80, 0x40]
    icons = {name: set(data.column("icon", rows)) for name, rows in data.splits.items()}
    assert len(icons["test"]) == 7 and not icons["test"] & icons["train"] and not icons["test"] & icons["test_support"]
    assert icons["id_val"] == icons["test"]
    assert set(data.column("domain", data.splits["train"])) == {2, 3, 4, 5}  # noto-v1 is left out too
    assert np.array_equal(data.splits["val"], data.splits["id_val"])
    assert emoji7.load(root, emoji7.Options(target="noto")).digest == data.digest


def test_other_editions_are_refused(root):
    pytest.importorskip("resvg_py", reason="emoji7 needs resvg-py")
    path = root / "iconify" / "openmoji" / "icons.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"openmoji.*SHA-256"):
        emoji7.load(root, emoji7.Options())
