"""A registered model as a folder that MLflow understands: files, signature, input example, requirements.

``mlflow.pyfunc.load_model("models:/NAME@champion")`` rebuilds it from its own copy of the weights, wherever moepipe is
installed; :func:`_load_pyfunc` is what MLflow calls. Images come in as the data set's evaluation transform gives them,
logits go out. ``moepipe serve models:/NAME@champion`` needs none of this: it reads the store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

META, DATA = "moepipe.json", "data"
_REQUIREMENTS = ("moepipe", "torch", "torchvision", "timm", "numpy", "safetensors")
_LARGEST = 2 * 10**9  # bytes that are copied into MLflow's artifacts


@dataclass(frozen=True)
class Package:
    """What MLflow is told about a model.

    Attributes:
        folder: with ``data`` (weights, record), ``input_example.json`` and ``requirements.txt``.
        inputs: shape of the images, the first axis -1.
        outputs: shape of the logits, the first axis -1.
        metadata: backbone, data set and digest, for the model's page.
    """

    folder: Path
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    metadata: Mapping[str, Any]


def write_package(artifact: Path, meta: Mapping[str, Any], digest: str, size: int, folder: Path) -> Package | None:
    """Write the folder; None for a model that is not a plain image network, or is too large to copy.

    Args:
        artifact: folder with the model's files.
        meta: its record (``workers.modelfile.model_meta``).
        digest: of the artifact.
        size: bytes of its files.
        folder: empty.
    """
    if not {"form", "backbone", "num_outputs", "dataset"} <= set(meta) or size > _LARGEST:
        return None
    shutil.copytree(artifact, folder / DATA)
    (folder / DATA / META).write_text(json.dumps(dict(meta), indent=1, sort_keys=True))
    height, width = _image_size(meta)
    shape = (1, int(meta["backbone"].get("channels", 3)), height, width)
    (folder / "input_example.json").write_text(json.dumps({"inputs": _example(shape)}))
    lines = [f"{name}=={found}" for name in _REQUIREMENTS if (found := _installed(name))]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n")
    metadata = {"artifact": digest, "dataset": str(meta["dataset"]), "backbone": str(meta["backbone"]["name"])}
    return Package(folder, (-1, *shape[1:]), (-1, int(meta["num_outputs"])), metadata)


def _image_size(meta: Mapping[str, Any]) -> tuple[int, int]:
    """Side that it was trained on, or the data set's."""
    if meta.get("image_size"):
        return int(meta["image_size"]), int(meta["image_size"])
    from workers.datasets.base import DATASETS

    height, width = DATASETS.load(str(meta["dataset"])).INFO.image_size
    return int(height), int(width)


def _example(shape: tuple[int, ...]) -> Any:
    """One image of noise, the same every time; rounded, so that the file stays small."""
    import numpy as np

    return np.random.default_rng(0).normal(size=shape).round(2).tolist()


def _installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""


class Predictor:
    """Images ``[N, C, H, W]`` to logits ``[N, K]``, both float32 NumPy arrays."""

    def __init__(self, folder: Path) -> None:
        from workers.modelfile import load_student

        self.meta = json.loads((folder / META).read_text())
        self.model = load_student(folder, self.meta)

    def predict(self, images: Any, params: Mapping[str, Any] | None = None) -> Any:
        """MLflow's call; there are no parameters."""
        import numpy as np
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(np.array(images, dtype=np.float32))).float().numpy()


def _load_pyfunc(path: str) -> Predictor:
    """What ``mlflow.pyfunc.load_model`` calls with the folder ``data``."""
    return Predictor(Path(path))
