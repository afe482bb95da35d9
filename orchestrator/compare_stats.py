"""How sure a difference is: the paired bootstrap over seeds and over test images (or domains), and Holm's correction.

Two methods are compared on what both were scored on. Seeds and images are crossed (every seed's models see the same
images), so both are resampled, independently of each other: Owen, "The pigeonhole bootstrap" (2007). Domains stay as
they are where single predictions are stored: the claim is about these domains. Where they are not, domains are
resampled in the images' place. P-values are two-sided; over the rows of a table they are corrected by Holm's step-down
rule. A bootstrap over fewer than five seeds alone says nothing and is not made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Level = Literal["examples", "domains", "seeds", "none"]
Array = NDArray[Any]
FEWEST_SEEDS = 5
_MANY = 5000  # categories above which patterns of answers are drawn one by one


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline, in the units of the scores.

    Attributes:
        mean: over the seeds that both have.
        low, high: 95% percentile interval; None where nothing could be resampled.
        p: two-sided, before correction; None likewise.
        level: what was resampled besides the seeds.
        seeds: how many both have.
        corrected: ``p`` after Holm's correction over the table.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    level: Level
    seeds: int
    corrected: float | None = None

    @property
    def mark(self) -> str:
        """``**`` below 0.01, ``*`` below 0.05, else nothing."""
        if self.corrected is None:
            return ""
        return "**" if self.corrected < 0.01 else "*" if self.corrected < 0.05 else ""


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error (sample deviation / sqrt(n)); None for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def by_examples(correct: Mapping[str, Array], replicates: int, seed: int) -> Difference:
    """From differences of single predictions.

    Args:
        correct: domain -> ``[S, N]`` differences of correctness (-1, 0, 1), S seeds, N images of that domain.
        replicates: resamples.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    seeds = next(iter(correct.values())).shape[0]
    point = float(np.mean([values.mean() for values in correct.values()]))
    drawn = np.mean([_resampled(values, replicates, rng) for values in correct.values()], axis=0)
    return _interval(point, _seeds(drawn, rng), "examples", seeds)


def by_domains(scores: Sequence[Array], replicates: int, seed: int) -> list[Difference]:
    """From differences of the scores of domains, of many comparisons at once.

    Args:
        scores: ``[S, D]`` each, of S seeds and D domains; one domain leaves the seeds alone.
        replicates: resamples; comparisons of equal shape share their draws.
        seed: of the draws.
    """
    found: dict[int, Difference] = {}
    shapes: dict[tuple[int, int], list[int]] = {}
    for place, own in enumerate(scores):
        if own.shape[1] == 1:
            found[place] = by_seeds(own[:, 0], replicates, seed)
        else:
            shapes.setdefault((own.shape[0], own.shape[1]), []).append(place)
    for (seeds, domains), places in shapes.items():
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(domains, np.full(domains, 1 / domains), size=replicates) / domains
        shares = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
        both = np.einsum("rs,rd->sdr", shares, weights).reshape(seeds * domains, replicates)
        stacked = np.stack([scores[place] for place in places])
        drawn = stacked.reshape(len(places), seeds * domains) @ both
        intervals = _intervals(stacked.mean(axis=(1, 2)), drawn, "domains", seeds)
        found.update(zip(places, intervals, strict=True))
    return [found[place] for place in range(len(scores))]


def by_seeds(values: Array, replicates: int, seed: int) -> Difference:
    """From one difference per seed."""
    mean = float(np.mean(values))
    if len(values) < FEWEST_SEEDS:
        return Difference(mean, None, None, None, "none", len(values))
    rng = np.random.default_rng(seed)
    drawn = np.broadcast_to(values, (replicates, len(values)))
    return _interval(mean, _seeds(drawn, rng), "seeds", len(values))


def _resampled(values: Array, replicates: int, rng: np.random.Generator) -> Array:
    """Means ``[R, S]`` over resampled images. Images with the same answers of all seeds are one category."""
    patterns, counts = np.unique(values.T, axis=0, return_counts=True)
    total = int(counts.sum())
    if len(patterns) == 1:
        return np.repeat(patterns.astype(float), replicates, axis=0)
    if len(patterns) > _MANY:
        return np.stack([values[:, rng.integers(0, total, total)].mean(axis=1) for _ in range(replicates)])
    weights = rng.multinomial(total, counts / total, size=replicates)
    means: Array = weights @ patterns / total
    return means


def _seeds(drawn: Array, rng: np.random.Generator) -> Array:
    """Means ``[R]`` of ``[R, S]`` over resampled seeds."""
    replicates, seeds = drawn.shape
    if seeds == 1:
        return drawn[:, 0]
    chosen = rng.integers(0, seeds, (replicates, seeds))
    means: Array = np.take_along_axis(drawn, chosen, axis=1).mean(axis=1)
    return means


def _interval(point: float, drawn: Array, level: Level, seeds: int) -> Difference:
    return _intervals(np.array([point]), drawn[None], level, seeds)[0]


def _intervals(points: Array, drawn: Array, level: Level, seeds: int) -> list[Difference]:
    """Differences from their means ``[C]`` and resampled means ``[C, R]``."""
    lows, highs = np.quantile(drawn, [0.025, 0.975], axis=1)
    tails = np.minimum((drawn <= 0).sum(axis=1), (drawn >= 0).sum(axis=1))
    ps = np.minimum(1.0, 2 * (tails + 1) / (drawn.shape[1] + 1))
    return [
        Difference(float(point), float(low), float(high), float(p), level, seeds)
        for point, low, high, p in zip(points, lows, highs, ps, strict=True)
    ]


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Corrected p-values (Holm 1979); None stays None."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    found: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        found[place] = highest
    return found


class Predictions:
    """Stored predictions as right or wrong, by domain; every file is read once."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, Array]] = {}
        self._labels: dict[Path, Array] = {}

    def correct(self, place: tuple[Path, str, Path], domains: Sequence[str], counts: Sequence[int]) -> dict[str, Array]:
        """Domain -> ``[2, N]``: the images' rows, and whether they were right (0 or 1). Empty without predictions."""
        folder, method, data = place
        try:
            tensors = self._tensors(folder)
            rows, logits = tensors["rows"], tensors[method]
            labels = self._labels_of(data)[rows]
        except (OSError, KeyError, IndexError, ValueError):
            return {}
        predicted = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(axis=1)
        both = np.stack([rows, (predicted == labels).astype(np.int64)])
        ends = np.cumsum(counts)
        if not len(ends) or ends[-1] != both.shape[1]:
            return {}
        return dict(zip(domains, np.split(both, ends[:-1], axis=1), strict=True))

    def _tensors(self, folder: Path) -> dict[str, Array]:
        from safetensors.numpy import load_file

        if folder not in self._files:
            self._files[folder] = load_file(folder / "logits.safetensors")
        return self._files[folder]

    def _labels_of(self, folder: Path) -> Array:
        if folder not in self._labels:
            with np.load(folder / "index.npz", allow_pickle=False) as archive:
                self._labels[folder] = archive["labels"]
        return self._labels[folder]
