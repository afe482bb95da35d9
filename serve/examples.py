"""Pictures of held-out domains as files, for the browser page, for curl and for anybody who wants to look at them.

Below one folder: ``domains/DOMAIN/*.png`` to adapt on (unlabelled), ``unseen/DOMAIN/NN-is-LABEL.png`` to ask about (the
label is in the file's name only, for the eyes of people), and ``infer.json``, a request of the Open Inference Protocol
with two of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe.errors import DataError
from workers.datasets.base import DomainData
from workers.protocols import DomainRows

DOMAINS, UNSEEN, REQUEST = "domains", "unseen", "infer.json"
_ASKED = 10


def write_examples(folder: Path, data: DomainData, domains: Iterable[DomainRows]) -> None:
    """Write the pictures of ``domains`` and the request; what an earlier call wrote is replaced.

    Args:
        folder: made when it is not there.
        data: uint8 images of one or three channels.
        domains: rows to adapt on, all written, and rows to ask about, of which ten are.

    Raises:
        DataError: images that are no pictures.
    """
    for name in (DOMAINS, UNSEEN):
        shutil.rmtree(folder / name, ignore_errors=True)
    asked: list[NDArray[np.uint8]] = []
    names = data.value_names.get("y", ())
    for domain in domains:
        place = plain(domain.name)
        for number, row in enumerate(domain.adapt):
            _save(_pixels(data, int(row)), folder / DOMAINS / place / f"{number:03d}.png")
        for number, row in enumerate(domain.score[:_ASKED]):
            label = int(data.labels[int(row)])
            told = plain(names[label] if label < len(names) else str(label))
            _save(_pixels(data, int(row)), folder / UNSEEN / place / f"{number:02d}-is-{told}.png")
            asked += [_pixels(data, int(row))] if len(asked) < 2 else []
    (folder / REQUEST).write_text(json.dumps(infer_request(asked)), encoding="utf-8")


def infer_request(images: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
    """A JSON request with uint8 images ``[H, W, C]`` that asks for the labels and the three best probabilities."""
    stacked = np.stack(images)
    image = {"name": "image", "datatype": "UINT8", "shape": list(stacked.shape), "data": stacked.ravel().tolist()}
    best = {"name": "probabilities", "parameters": {"classification": 3}}
    return {"id": "example", "inputs": [image], "outputs": [{"name": "label"}, best]}


def plain(text: str) -> str:
    """``text`` as a file name and as a name of a domain state."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:64] or "domain"


def _pixels(data: DomainData, row: int) -> NDArray[np.uint8]:
    image = np.asarray(data.images[row])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise DataError(
            f"Images of {data.info.name} are {image.dtype} {list(image.shape)}: no pictures.", "Send them as .npy."
        )
    return image


def _save(image: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
