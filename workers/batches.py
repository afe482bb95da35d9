"""Rows to device tensors: decoding in threads, one or two batches ahead of the step that needs them.

A batch is a function of the step. The prefetcher only computes it early, so the order in which threads finish has no
effect on results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from moe.errors import DataError, SpecError
from workers.datasets.base import Images, IntArray
from workers.transforms import Transform

T = TypeVar("T")

DECODED_BYTES = 1 << 30
"""Decoded images kept in memory by one reader; small sets are decoded once, large ones in part."""


class ImageReader:
    """Transformed images by row.

    Sets that already live in memory as one uint8 array (``images.array``) are read in one slice; others are decoded by
    ``threads`` threads and kept up to ``budget`` bytes.

    Args:
        images: the data set's images.
        transform: applied to every batch.
        threads: decoding threads; 0 decodes in the calling thread.
        budget: bytes of decoded images to keep.
    """

    def __init__(self, images: Images, transform: Transform, threads: int = 0, budget: int = DECODED_BYTES) -> None:
        self.transform = transform
        self._images = images
        self._array: NDArray[np.uint8] | None = getattr(images, "array", None)
        self._decoded: dict[int, NDArray[np.generic]] = {}
        self._room = budget
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 0 and self._array is None else None
        self._fixed = [transform.fixed(v) for v in range(transform.variants)] if transform.variants > 1 else []

    def read(self, rows: IntArray, variants: IntArray | None = None) -> torch.Tensor:
        """Images of ``rows``, float32 ``[B, C, H, W]`` on the CPU.

        Args:
            rows: row numbers of the data set, ``[B]``.
            variants: which variant of a random transform each image gets, ``[B]``; None only where it has just one.

        Raises:
            DataError: an image is corrupt or missing (named).
        """
        # A dimension of size 1 may carry any stride, and convolutions choose kernels (so the last bit) by strides.
        images = self._transformed(rows, variants)
        return images.reshape(-1).view(images.shape)

    def _transformed(self, rows: IntArray, variants: IntArray | None) -> torch.Tensor:
        raw = self._raw(rows)
        if variants is None or not self._fixed:
            return self.transform.batch(raw)
        out: torch.Tensor | None = None
        for variant in np.unique(variants):
            places = np.flatnonzero(variants == variant)
            part = self._fixed[int(variant)].batch([raw[int(place)] for place in places])
            out = part.new_empty((len(rows), *part.shape[1:])) if out is None else out
            out[torch.from_numpy(places)] = part
        return self.transform.batch(raw) if out is None else out

    def draw(self, count: int, rng: np.random.Generator) -> IntArray | None:
        """One variant per image from ``rng``, ``[count]``; None when the transform has just one."""
        return rng.integers(self.transform.variants, size=count) if self.transform.variants > 1 else None

    def close(self) -> None:
        """End the decoding threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _raw(self, rows: IntArray) -> NDArray[np.generic] | list[NDArray[np.generic]]:
        if self._array is not None:
            return self._array[rows]
        if self._pool is None:
            return [self._one(int(row)) for row in rows]
        return list(self._pool.map(self._one, (int(row) for row in rows)))

    def _one(self, row: int) -> NDArray[np.generic]:
        image = self._decoded.get(row)
        if image is None:
            image = np.asarray(self._images[row])
            if image.nbytes <= self._room:  # threads may overshoot by one image each, which does not matter
                self._room -= image.nbytes
                self._decoded[row] = image
        return image


class Prefetcher(Generic[T]):
    """Calls ``make(step)`` in a background thread for the next steps.

    Args:
        make: the batch of a step; must not depend on earlier calls.
        steps: total number of steps; nothing is made beyond.
        depth: how many steps ahead; 0 switches it off.
    """

    def __init__(self, make: Callable[[int], T], steps: int, depth: int = 2) -> None:
        self._make, self._steps, self._depth = make, steps, depth
        self._pool = ThreadPoolExecutor(1, "prefetch") if depth > 0 else None
        self._pending: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """The batch of ``step``; errors of the background thread surface here."""
        if self._pool is None:
            return self._make(step)
        for ahead in range(step, min(step + self._depth + 1, self._steps)):
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._make, ahead)
        for stale in [known for known in self._pending if known < step]:
            self._pending.pop(stale).cancel()
        return self._pending.pop(step).result() if step in self._pending else self._make(step)

    def close(self) -> None:
        """End the thread; batches not asked for are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class DomainSampler:
    """Batches in which every domain is equally likely at every place, whatever its size.

    Args:
        rows: row numbers, ``[N]``.
        domains: domain of each, ``[N]``.
        batch_size: rows per batch.
        seed: the batch of a step depends on nothing but (seed, step).
        balanced: every batch has as many rows of each domain, domain after domain.

    Raises:
        DataError: there are no rows.
        SpecError: ``balanced``, and the domains do not divide the batch.
    """

    def __init__(self, rows: IntArray, domains: IntArray, batch_size: int, seed: int, balanced: bool = False) -> None:
        if not len(rows):
            raise DataError("There are no rows to train on.", "Check the split and the domain group.")
        self._by_domain = [rows[domains == domain] for domain in np.unique(domains)]
        self._batch_size, self._seed, self._balanced = batch_size, seed, balanced
        if balanced and batch_size % len(self._by_domain):
            count = len(self._by_domain)
            raise SpecError(
                f"batch_size={batch_size} cannot be shared equally by {count} domains.",
                f"Use a multiple of {count}, e.g. {max(1, round(batch_size / count)) * count}.",
            )
        self.steps_per_epoch = -(-len(rows) // batch_size)

    def batch(self, step: int) -> IntArray:
        """Row numbers of ``step``, int64 ``[batch_size]``; a domain's rows are drawn with replacement."""
        rng = np.random.default_rng((self._seed, step))
        count = len(self._by_domain)
        if self._balanced:
            chosen = np.repeat(np.arange(count), self._batch_size // count)
        else:
            chosen = rng.integers(count, size=self._batch_size)
        return np.array([rng.choice(self._by_domain[domain]) for domain in chosen], dtype=np.int64)


def chunks(rows: IntArray, size: int) -> Sequence[IntArray]:
    """``rows`` in consecutive pieces of at most ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
