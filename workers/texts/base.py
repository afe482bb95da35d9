"""The text contract: labelled texts in splits, some of them out of domain.

One data set is one file ``workers/texts/<name>.py`` that defines

- ``INFO``: a :class:`TextInfo`,
- ``Options``: a frozen pydantic model of what a user may choose, all with defaults,
- ``load(root, options) -> TextData``: reads below ``root`` (or an unpacked package); never downloads,
- ``missing(root) -> list[Missing]``: what the default options lack, each with the command or place that brings it,
- ``miniature(root, seed)``: writes a small generated set in the official layout, or is absent where none is needed.

Torch is not imported here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError
from moe.registry import Registry
from workers.datasets.base import Missing

__all__ = [
    "TEXTS",
    "Missing",
    "TextData",
    "TextInfo",
    "TextRows",
    "list_texts",
    "load_text",
    "text_data",
    "write_miniature",
]

TEXTS = Registry("workers.texts", noun="text data set", entry_point="moepipe.texts")
OOD = "ood:"
"""Prefix of the splits out of domain."""


@dataclass(frozen=True)
class TextInfo:
    """Everything about a text data set that does not need its files.

    Attributes:
        name: registry name; a task follows a slash (``glue/rte``).
        title: one line for listings.
        task: what a label is.
        num_outputs: classes; 1 for regression.
        metrics: names of ``workers.glue``'s metrics; their mean selects.
        licence: of the data.
        source: package or site that carries it.
        generated: the texts are a miniature and say nothing about results.
    """

    name: str
    title: str
    task: Literal["multiclass", "regression"]
    num_outputs: int
    metrics: tuple[str, ...]
    licence: str
    source: str
    generated: bool = False


@dataclass(frozen=True)
class TextRows:
    """Labelled texts.

    Attributes:
        first: a text each.
        second: the other text of each pair; empty for single texts.
        labels: int64 classes, or float64 values, ``[N]``.
        metrics: of this split, instead of the data set's own, when given.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    labels: NDArray[Any]
    metrics: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Rows."""
        return len(self.first)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> TextRows:
        """Some of the rows, in the order given."""
        chosen = [int(row) for row in rows]
        second = tuple(self.second[row] for row in chosen) if self.second else ()
        return TextRows(tuple(self.first[row] for row in chosen), second, self.labels[chosen], self.metrics)


@dataclass(frozen=True)
class TextData:
    """A loaded text data set.

    Attributes:
        info: the record.
        splits: ``train``, ``validation`` and any number of ``ood:<name>``.
        digest: sha256 over everything above that decides results.
    """

    info: TextInfo
    splits: Mapping[str, TextRows]
    digest: str


def text_data(info: TextInfo, splits: Mapping[str, TextRows]) -> TextData:
    """Put checked splits together.

    Raises:
        DataError: an empty split, or labels outside the classes.
    """
    digest = hashlib.sha256(repr(dataclasses.asdict(info)).encode())
    for name, rows in splits.items():
        if not len(rows):
            raise DataError(f"{info.name}: the split {name} has no rows.", "Is its file complete?")
        if info.task == "multiclass":
            low, high = int(rows.labels.min()), int(rows.labels.max())
            if low < 0 or high >= info.num_outputs:
                raise DataError(
                    f"{info.name}: the split {name} has the label {low if low < 0 else high}; "
                    f"there are the classes 0 to {info.num_outputs - 1}.",
                    "Rows without a label (-1) belong to a hidden test set: use the validation file.",
                )
        digest.update(f"\0{name}\0{rows.metrics}\0".encode())
        for texts in (rows.first, rows.second):
            digest.update(hashlib.sha256("\0".join(texts).encode()).digest())
        digest.update(np.ascontiguousarray(rows.labels).tobytes())
    return TextData(info, dict(splits), digest.hexdigest())


def parse_options(name: str, options: Mapping[str, Any]) -> Any:
    """The data set's ``Options`` (SpecError: unknown data set, unknown option or a value out of range)."""
    from pydantic import ValidationError

    module = TEXTS.load(name)
    try:
        return module.Options(**options)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        allowed = ", ".join(module.Options.model_fields)
        raise SpecError(f"Text data set {name} refuses its options: {found}.", f"Options: {allowed}.") from None


def load_text(name: str, options: Mapping[str, Any], root: Path) -> TextData:
    """Open a text data set by registry name (NotFoundError, DataError and SpecError as its ``load`` documents)."""
    data: TextData = TEXTS.load(name).load(root, parse_options(name, options))
    return data


def write_miniature(name: str, root: Path, seed: int = 0) -> None:
    """Write the generated stand-in of a text data set (SpecError: unknown name, or there is none)."""
    module = TEXTS.load(name)
    if not hasattr(module, "miniature"):
        gaps = " ".join(f"Fetch the real texts: {gap.fix}" for gap in module.missing(root))
        raise SpecError(f"{name} has no miniature.", gaps or "The real texts are there.")
    module.miniature(root, seed)


def list_texts(root: Path) -> list[dict[str, Any]]:
    """Name, title, presence and remedies of every text data set, for ``moepipe data ls``."""
    rows = []
    for name in TEXTS.names():
        module = TEXTS.load(name)
        gaps = module.missing(root)
        info: TextInfo = module.INFO
        rows.append(
            {
                "name": name,
                "title": info.title,
                "task": info.task,
                "outputs": info.num_outputs,
                "licence": info.licence,
                "source": info.source,
                "present": not gaps,
                "missing": [{"what": gap.what, "fix": gap.fix} for gap in gaps],
                "generated": hasattr(module, "miniature"),
            }
        )
    return rows
