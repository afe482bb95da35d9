"""Data sets that the server knows, by name: ``dataset:NAME/SPLIT`` or ``dataset:NAME/SPLIT/DOMAIN``.

Only prepared sets below the folder that the server was given are read; a client names, it never gives a path.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import NotFoundError, SpecError, nearest
from serve.http.problems import Refused
from workers.datasets.base import DATASETS, DomainData

_URI = re.compile(r"dataset:([a-z0-9_]{1,64})/([a-z0-9_]{1,64})(?:/([A-Za-z0-9_. -]{1,64}))?")


class KnownData:
    """Reads images of prepared data sets; the last one stays open.

    Args:
        folder: below which prepared sets live; None when the server knows none.
        most: images of one request.
    """

    def __init__(self, folder: Path | None, most: int = 4096) -> None:
        self._folder, self._most = folder, most
        self._open: tuple[str, DomainData] | None = None
        self._lock = threading.Lock()

    def read(self, uri: str) -> list[NDArray[Any]]:
        """The images that ``uri`` names.

        Raises:
            SpecError: not such a URI.
            NotFoundError: no such set, split or domain, or its files are not there.
            Refused: 413 for more images than allowed.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise SpecError(
                f"{uri[:80]!r} names no data set.", "Write dataset:NAME/SPLIT or dataset:NAME/SPLIT/DOMAIN."
            )
        name, split, domain = match.groups()
        if self._folder is None:
            raise NotFoundError(
                "This server was given no data sets.", "Start it with a data folder, or send the images."
            )
        with self._lock:
            data = self._load(name, self._folder)
        if split not in data.splits:
            raise NotFoundError(f"{name} has no split {split!r}.", nearest(split, data.splits))
        rows = data.splits[split]
        if domain is not None:
            rows = rows[data.column(data.info.domain_field, rows) == _value(data, domain)]
        if len(rows) == 0:
            raise NotFoundError(f"{name}/{split} has no images of the domain {domain!r}.", "Choose another one.")
        if len(rows) > self._most:
            raise Refused(
                413,
                "too-many-images",
                f"{uri} has {len(rows)} images; at most {self._most} are read.",
                "Name a domain.",
            )
        return [np.asarray(data.images[int(row)]) for row in rows]

    def _load(self, name: str, folder: Path) -> DomainData:
        if self._open is None or self._open[0] != name:
            if name not in DATASETS.names():
                raise NotFoundError(f"There is no data set {name!r}.", nearest(name, DATASETS.names()))
            module = DATASETS.load(name)
            self._open = (name, module.load(folder, module.Options()))
        return self._open[1]


def _value(data: DomainData, domain: str) -> int:
    """The metadata value that ``domain`` stands for: its name, or the number itself. Raises NotFoundError."""
    names = data.value_names.get(data.info.domain_field, ())
    if domain in names:
        return names.index(domain)
    if domain.isascii() and domain.isdigit():
        return int(domain)
    raise NotFoundError(f"There is no domain {domain!r}.", nearest(domain, names))
