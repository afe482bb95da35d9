"""The dataset contract: a metadata record, and rows with images, labels and domain metadata.

One dataset is one file ``workers/datasets/<name>.py`` that defines

- ``INFO``: a :class:`DatasetInfo`,
- ``Options``: a frozen pydantic model of what a user may choose (held-out domain, fold, ...), all with defaults,
- ``load(root, options) -> DomainData``: reads ``root`` (or the installed packages of an embedded set); never downloads,
- ``miniature(root, seed) -> None``: writes a small generated set in the official on-disk layout (WILDS sets), or is
  absent where the real data is embedded,
- ``missing(root) -> list[Missing]``: what is not there, each with the exact command that fetches it.

Torch is not imported here: the data stage and the command line must stay light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moe.registry import Registry

IntArray = NDArray[np.int64]
Task = Literal["multiclass", "binary", "regression"]

DATASETS = Registry("workers.datasets", noun="dataset", entry_point="moepipe.datasets")


@dataclass(frozen=True)
class Missing:
    """Something a dataset needs that is not there."""

    what: str
    fix: str


@dataclass(frozen=True)
class FileRecord:
    """A source file with its size in bytes and checksum, for ``moepipe data verify``."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """Everything about a data set that does not need its files.

    Attributes:
        name: registry name, e.g. ``camelyon17``.
        title: one line for listings.
        task: what a label is.
        num_outputs: classes K; 1 for a binary logit or a regression value.
        channels: image channels.
        image_size: nominal (height, width) in pixels after the official transform.
        domain_field: metadata column whose value decides which expert owns a row.
        group_fields: metadata columns whose combination is an adaptation domain.
        metrics: names of the scores, see ``workers.metrics``.
        selection_metric: the one that chooses checkpoints, higher is better.
        normalisation: ``imagenet``, ``unit`` (to [0,1]), ``instance`` (per image and channel) or ``none``.
        licence: licence of the data.
        source: package or site that carries it.
        extra: pip extra of this project that brings it, or empty.
        citation: short reference.
        files: known files with checksums; may be empty when the layout is checked instead.
    """

    name: str
    title: str
    task: Task
    num_outputs: int
    channels: int
    image_size: tuple[int, int]
    domain_field: str
    group_fields: tuple[str, ...]
    metrics: tuple[str, ...]
    selection_metric: str
    normalisation: Literal["imagenet", "unit", "instance", "none"]
    licence: str
    source: str
    extra: str = ""
    citation: str = ""
    files: tuple[FileRecord, ...] = ()


class Images(Protocol):
    """Indexable images: uint8 ``[H, W, C]`` arrays (poverty: float32 ``[C, H, W]``)."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        """Decode one image. Raises DataError naming the file when it is corrupt or missing."""
        ...


@dataclass(frozen=True)
class DomainData:
    """A loaded data set: N rows with labels, metadata and split membership.

    Attributes:
        info: the record.
        images: N images, decoded on access.
        labels: int64 ``[N]`` classes, or float32 ``[N]`` for regression.
        metadata: int64 ``[N, C]``.
        fields: names of the C columns.
        splits: split name -> ascending rows, int64. Always ``train``, ``val``, ``test``; often ``id_val``, ``id_test``;
            embedded sets also ``test_support``: the half of the test domains that is given without labels.
        value_names: column -> names of its values (for tables and plots).
        digest: sha256 over everything above that decides results.
    """

    info: DatasetInfo
    images: Images
    labels: NDArray[np.generic]
    metadata: IntArray
    fields: tuple[str, ...]
    splits: Mapping[str, IntArray]
    digest: str
    value_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def column(self, name: str, rows: IntArray | None = None) -> IntArray:
        """Metadata column ``name`` (of ``rows``), int64."""
        values = self.metadata[:, self.fields.index(name)]
        return values if rows is None else values[rows]


def data_root(root: Path, info: DatasetInfo) -> Path:
    """Folder below the data root where prepared copies of ``info``'s set live."""
    return root / info.name
