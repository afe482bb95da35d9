"""The ``data`` artifact: which data set, with which options, and what its rows are; not the pixels.

Images stay where they are (package, folder, cache) and are opened again by every member; the digest recorded here makes
sure that they are still the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError
from workers.context import Input
from workers.datasets.base import DATASETS, DomainData, IntArray

INDEX = "index.npz"


def parse_options(name: str, options: Mapping[str, Any]) -> Any:
    """The data set's ``Options`` model built from plain values.

    Raises:
        SpecError: unknown data set, unknown option or a value out of range.
    """
    from pydantic import ValidationError

    module = DATASETS.load(name)
    try:
        return module.Options(**options)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        allowed = ", ".join(module.Options.model_fields)
        raise SpecError(f"Data set {name} refuses its options: {found}.", f"Options: {allowed or 'none'}.") from None


def load_data(name: str, options: Mapping[str, Any], root: Path) -> DomainData:
    """Open a data set by registry name (NotFoundError, DataError and SpecError as its ``load`` documents)."""
    data: DomainData = DATASETS.load(name).load(root, parse_options(name, options))
    return data


def write_index(data: DomainData, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the rows' labels, metadata and splits into ``folder`` and return the artifact's ``meta``."""
    arrays: dict[str, Any] = {f"split/{name}": rows for name, rows in data.splits.items()}
    np.savez(folder / INDEX, labels=data.labels, metadata=data.metadata, **arrays)
    (folder / "value_names.json").write_text(json.dumps({k: list(v) for k, v in data.value_names.items()}, indent=1))
    info = data.info
    domains = data.column(info.domain_field)
    return {
        "dataset": info.name,
        "options": dict(options),
        "digest": data.digest,
        "fields": list(data.fields),
        "rows": {name: len(rows) for name, rows in data.splits.items()},
        "domains": {name: len(np.unique(domains[rows])) for name, rows in data.splits.items()},
        "miniature": "_miniature" in data.value_names,
    }


@dataclass(frozen=True)
class Index:
    """Labels, metadata and splits as they were prepared; no images.

    Attributes:
        domain_field: metadata column whose value decides which expert owns a row.
        labels: ``[N]``.
        metadata: int64 ``[N, C]``.
        fields: names of the C columns.
        splits: split name -> ascending rows.
    """

    domain_field: str
    labels: NDArray[np.generic]
    metadata: IntArray
    fields: tuple[str, ...]
    splits: Mapping[str, IntArray]

    def column(self, name: str, rows: IntArray) -> IntArray:
        """Metadata column ``name`` of ``rows``."""
        values: IntArray = self.metadata[rows, self.fields.index(name)]
        return values


def read_index(artifact: Input) -> Index:
    """The rows of a ``data`` artifact, without opening the data set."""
    with np.load(artifact.path / INDEX, allow_pickle=False) as archive:
        splits = {name[6:]: archive[name] for name in archive.files if name.startswith("split/")}
        info = DATASETS.load(artifact.meta["dataset"]).INFO
        fields = tuple(artifact.meta["fields"])
        return Index(info.domain_field, archive["labels"], archive["metadata"], fields, splits)


def open_data(artifact: Input, root: Path) -> DomainData:
    """The data set that ``artifact`` describes, checked to be unchanged since it was prepared.

    Raises:
        DataError: files, package or recipe have changed.
    """
    data = load_data(artifact.meta["dataset"], artifact.meta["options"], root)
    if data.digest != artifact.meta["digest"]:
        raise DataError(
            f"The data set {data.info.name} below {root} is no longer the one that this run prepared "
            f"(digest {data.digest[:12]}, expected {artifact.meta['digest'][:12]}).",
            "Restore the files, or submit again: the data stage and what depends on it will run anew.",
        )
    return data


def rows_of(data: DomainData, splits: list[str] | tuple[str, ...]) -> IntArray:
    """Ascending rows of several splits together.

    Raises:
        SpecError: a split that this data set does not have.
    """
    for name in splits:
        if name not in data.splits:
            raise SpecError(
                f"Data set {data.info.name} has no split {name!r}.", f"Splits: {', '.join(sorted(data.splits))}."
            )
    return np.unique(np.concatenate([data.splits[name] for name in splits])).astype(np.int64)


def describe(data: DomainData) -> str:
    """One line: rows and domains by split."""
    domains = data.column(data.info.domain_field)
    parts = [f"{name} {len(rows)} rows / {len(Counter(domains[rows]))} domains" for name, rows in data.splits.items()]
    return f"{data.info.name}: " + ", ".join(parts)
