"""Who is adapted on what, and scored on what.

``official``: the public code's transductive procedure: adapt on the first ``support_size`` rows of each domain (in
data-set order), score all rows of the domain, those included. ``split``: adapt on the domain's rows of a separate
unlabelled split (``test_support`` for ``test``), score the others; the embedded sets are made for it.
Source: Meta-DMoE (arXiv 2210.03885), section 5 and public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe.errors import DataError, SpecError, nearest
from workers.datasets.base import DomainData, IntArray
from workers.sampling import group_index

Protocol = Literal["official", "split"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "split")


@dataclass(frozen=True)
class DomainRows:
    """One adaptation domain.

    Attributes:
        domain: group id.
        name: for tables.
        adapt: rows whose images (never labels) may be used to adapt; at least one.
        score: rows that are scored.
    """

    domain: int
    name: str
    adapt: IntArray
    score: IntArray


def domain_rows(
    data: DomainData, split: str, protocol: str, support_size: int, limit: int | None = None
) -> list[DomainRows]:
    """The domains of ``split``, ascending by id.

    Args:
        data: the data set.
        split: what is scored, e.g. ``test``.
        protocol: ``official`` or ``split``.
        support_size: most rows that a domain may be adapted on, at least 1.
        limit: score at most so many rows of each domain (evenly spaced), for quick looks; None scores all.

    Raises:
        SpecError: unknown protocol or split, or a number out of range.
        DataError: a domain has nothing to adapt on, or there is no domain.
    """
    if protocol not in PROTOCOLS:
        raise SpecError(f"There is no evaluation protocol named {protocol!r}.", nearest(protocol, PROTOCOLS))
    if support_size < 1 or (limit is not None and limit < 1):
        raise SpecError(f"support_size is {support_size} and limit is {limit}.", "Both must be at least 1.")
    groups, _ = group_index(data.metadata, data.fields, data.info.group_fields)
    scored = _rows(data, split)
    support = scored if protocol == "official" else _rows(data, f"{split}_support")
    found = []
    for domain in np.unique(groups[scored]):
        own = scored[groups[scored] == domain]
        adapt = support[groups[support] == domain][:support_size]
        name = domain_name(data, int(own[0]))
        if not len(adapt):
            raise DataError(
                f"Domain {name!r} has images in {split!r} and none in {split + '_support'!r}.",
                "Use the official protocol, or prepare the data set again.",
            )
        found.append(DomainRows(int(domain), name, adapt, own if limit is None else _spread(own, limit)))
    if not found:
        raise DataError(f"Split {split!r} of {data.info.name} has no rows.", "Choose another split.")
    return found


def domain_name(data: DomainData, row: int) -> str:
    """Readable name of the adaptation domain of ``row``: the names of its group values, joined by a slash."""
    parts = []
    for field in data.info.group_fields:
        value = int(data.column(field)[row])
        names: Sequence[str] = data.value_names.get(field, ())
        parts.append(str(names[value]) if value < len(names) else f"{field} {value}")
    return " / ".join(parts)


def _rows(data: DomainData, split: str) -> IntArray:
    if split not in data.splits:
        raise SpecError(
            f"Data set {data.info.name} has no split {split!r}.",
            f"Splits: {', '.join(sorted(data.splits))}. Without a support split, use the official protocol.",
        )
    return np.sort(data.splits[split])


def _spread(rows: IntArray, limit: int) -> IntArray:
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]
