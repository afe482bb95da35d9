"""Bootstrap confidence intervals over test images, paired across methods.

Rows are resampled with replacement inside each domain, so every replicate keeps the domains and their sizes. All
methods are scored on the same draws, which makes intervals of differences (adaptation gains) much narrower than those
of the scores. The interval speaks of the finite number of test images; the spread over seeds and the choice of domains
are other uncertainties, reported beside it. Reference: Efron & Tibshirani, An Introduction to the Bootstrap, ch. 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Statistic = Callable[[IntArray], FloatArray]
"""Row positions, int64 ``[N]`` -> float64 ``[S]`` statistics of these rows."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval ``low <= high`` at the confidence it was asked for."""

    low: float
    high: float


class PairedBootstrap:
    """Replicates of several statistics on common draws.

    Args:
        groups: ``[N]`` domain of every row.
        replicates: number of resamples R, at least 1.
        seed: of the draws.
        confidence: of the intervals, between 0 and 1.

    Raises:
        DataError: there are no rows.
        SpecError: ``replicates`` or ``confidence`` outside their range.
    """

    def __init__(self, groups: NDArray[Any], replicates: int = 1000, seed: int = 0, confidence: float = 0.95) -> None:
        if not len(groups):
            raise DataError("There are no rows to resample.", "Score at least one image.")
        if replicates < 1 or not 0 < confidence < 1:
            raise SpecError(
                f"replicates is {replicates} and confidence is {confidence}.",
                "Use at least one replicate and a confidence between 0 and 1.",
            )
        self.replicates, self.seed, self.confidence = replicates, seed, confidence
        _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
        self._order = np.argsort(inverse, kind="stable").astype(np.int64)
        self._sizes = np.repeat(counts, counts)
        self._starts = np.repeat(np.cumsum(counts) - counts, counts)

    def draw(self, replicate: int) -> IntArray:
        """Row positions of one resample, grouped by domain (ascending), int64 ``[N]``."""
        uniform = np.random.default_rng((self.seed, replicate)).random(len(self._order))
        places: IntArray = self._starts + (uniform * self._sizes).astype(np.int64)
        return self._order[places]

    def run(self, statistics: Mapping[str, Statistic]) -> dict[str, FloatArray]:
        """All statistics on all resamples, by name, float64 ``[R, S]``."""
        values: dict[str, list[FloatArray]] = {name: [] for name in statistics}
        for replicate in range(self.replicates):
            rows = self.draw(replicate)
            for name, statistic in statistics.items():
                values[name].append(statistic(rows))
        return {name: np.stack(found) for name, found in values.items()}

    def interval(self, values: FloatArray) -> Interval:
        """Percentile interval of ``[R]`` replicated values (or differences of two methods' values)."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(float(low), float(high))
