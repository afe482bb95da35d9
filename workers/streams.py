"""Streams of test batches for online adaptation.

The settings carry the names that the test-time-adaptation literature uses (benchmark of Döbler, Marsden & Yang,
``mariodoebler/test-time-adaptation``):

- ``reset_each_shift``: one domain after the other; the model is reset where a domain begins,
- ``continual``: the same order, never reset,
- ``mixed_domains``: images of all domains in random order, never reset,
- ``correlated``: as ``continual``, but the labels inside a domain come in clusters (not i.i.d.),
- ``reset_each_shift_correlated`` and ``mixed_domains_correlated``: the combinations.

The ``gradual`` settings of that benchmark need corruptions with severities, which natural domains do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError, nearest

IntArray = NDArray[np.int64]

SETTINGS = (
    "reset_each_shift",
    "continual",
    "mixed_domains",
    "correlated",
    "reset_each_shift_correlated",
    "mixed_domains_correlated",
)
_BINS = 10  # slots for continuous labels


@dataclass(frozen=True)
class StreamBatch:
    """What arrives at one moment.

    Attributes:
        rows: rows of the data set, int64.
        domain: their domain, or None when mixed.
        reset: start again from the unadapted model before this batch.
    """

    rows: IntArray
    domain: int | None
    reset: bool


def stream(
    domains: Sequence[tuple[int, IntArray]],
    labels: NDArray[Any],
    setting: str,
    batch_size: int,
    seed: int,
    concentration: float = 0.1,
) -> list[StreamBatch]:
    """Order the rows of some domains into batches.

    Args:
        domains: (domain id, its rows), in the order in which they are met.
        labels: labels of the whole data set, indexed by row; they order the correlated settings and nothing else.
        setting: one of :data:`SETTINGS`.
        batch_size: rows per batch; the last one of a domain (or of a mixed stream) may be short.
        seed: of all shuffling.
        concentration: Dirichlet parameter of the correlated settings; smaller means stronger label clusters.

    Returns:
        Batches that hold every row exactly once.

    Raises:
        SpecError: unknown setting, or a number outside its range.
        DataError: no rows.
    """
    if setting not in SETTINGS:
        raise SpecError(f"There is no streaming setting named {setting!r}.", nearest(setting, SETTINGS))
    if batch_size < 1 or concentration <= 0:
        raise SpecError(
            f"batch_size is {batch_size} and concentration is {concentration}.", "Both must be positive numbers."
        )
    if not any(len(rows) for _, rows in domains):
        raise DataError("There are no rows to stream.", "Check the split.")
    parts: list[tuple[int | None, IntArray]] = [(domain, rows) for domain, rows in domains if len(rows)]
    if setting.startswith("mixed_domains"):
        parts = [(None, np.concatenate([rows for _, rows in parts]))]
    batches: list[StreamBatch] = []
    for number, (domain, rows) in enumerate(parts):
        generator = np.random.default_rng((seed, number))
        rows = generator.permutation(rows)
        if setting.endswith("correlated"):
            rows = _cluster(rows, labels[rows], concentration, generator)
        resets = setting.startswith("reset_each_shift") or number == 0
        for start in range(0, len(rows), batch_size):
            batches.append(StreamBatch(rows[start : start + batch_size], domain, resets and start == 0))
    return batches


def _cluster(rows: IntArray, labels: NDArray[Any], concentration: float, generator: np.random.Generator) -> IntArray:
    """Reorder shuffled rows so that labels cluster in time.

    As many slots as classes; every class is divided over the slots by proportions from a symmetric Dirichlet
    distribution (the construction of LAME and RoTTA).
    """
    if labels.dtype.kind == "f":
        ranks = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
        labels = ranks * _BINS // len(ranks)
    classes = np.unique(labels)
    slots: list[list[IntArray]] = [[] for _ in classes]
    for value in classes:
        members = rows[labels == value]
        shares = generator.dirichlet(np.full(len(classes), concentration))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for slot, part in zip(slots, np.split(members, cuts), strict=True):
            slot.append(part)
    ordered: list[IntArray] = []
    for slot in slots:
        ordered.extend(slot[index] for index in generator.permutation(len(slot)))
    return np.concatenate(ordered)
