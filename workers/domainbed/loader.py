"""The endless minibatches of one domain, with the official random draws.

A pass draws one seed from the run's generator and then as many rows, with replacement, as the domain has; the tail that
does not fill a batch is dropped, and the next pass begins. A weighted pass is one batch. Before the first pass one
number is drawn and thrown away: a DataLoader's base seed. Draws of several domains from one generator interleave as in
the public code without worker processes.

Known differences: the generator is passed, where the public code uses the global one (give ``torch.default_generator``
to share it); a domain smaller than a batch is an error, where the public code hangs; the stream can be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.errors import SpecError

if TYPE_CHECKING:
    from torch import Generator


class InfiniteBatches:
    """Iterator over lists of ``batch_size`` rows; never ends.

    Args:
        size: images of the domain.
        batch_size: rows a batch.
        generator: the run's; it is advanced.
        weights: optional chance of each row, not negative, e.g. :func:`workers.domainbed.scores.balanced_weights`.

    Raises:
        SpecError: numbers below 1, a domain smaller than a batch, or weights that do not fit.
    """

    def __init__(self, size: int, batch_size: int, generator: Generator, weights: Any | None = None) -> None:
        import torch

        if size < 1 or batch_size < 1:
            raise SpecError(f"Batches of {batch_size} from {size} images: both must be at least 1.")
        if weights is None and size < batch_size:
            raise SpecError(f"A domain of {size} images never fills a batch of {batch_size}.", "Set batch_size lower.")
        self.size, self.batch_size, self._generator = size, batch_size, generator
        self._weights = None if weights is None else _checked(weights, size)
        self._batches: Iterator[list[int]] = iter(())
        self._seed: int | None = None
        self._taken = 0
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # the base seed of a DataLoader

    def __iter__(self) -> InfiniteBatches:
        return self

    def __next__(self) -> list[int]:
        """The next batch."""
        for batch in self._batches:
            self._taken += 1
            return batch
        self._begin(None)
        return next(self)

    def use(self, generator: Generator) -> None:
        """Take the seeds of the coming passes from another generator."""
        self._generator = generator

    def state_dict(self) -> dict[str, int | None]:
        """Where the stream stands, for a checkpoint; the generator's own state is saved by its owner."""
        return {"seed": self._seed, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Go on from ``state``. Restore the generator after making this object, which draws from it.

        Raises:
            SpecError: not a state of such a stream.
        """
        if state.keys() != {"seed", "taken"}:
            raise SpecError(f"A state with the keys {sorted(state)} is none of a batch stream.")
        seed, taken = state["seed"], state["taken"] or 0
        if seed is not None and not 0 <= taken <= (full := self.size // self.batch_size):
            raise SpecError(
                f"The state is {taken} batches into a pass, and {self.size} images give {full}.",
                "Load it with the batch size and the domain it was saved with.",
            )
        self._batches, self._seed, self._taken = iter(()), None, 0
        if seed is not None:
            self._begin(seed)
            for _ in range(taken):
                next(self)

    def _begin(self, seed: int | None) -> None:
        """Begin a pass, with a drawn seed or the one given."""
        import torch
        from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

        sampler: RandomSampler | WeightedRandomSampler
        if self._weights is not None:
            sampler = WeightedRandomSampler(self._weights, self.batch_size, generator=self._generator)
        else:
            if seed is None:
                seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._generator))
            own = torch.Generator().manual_seed(seed)
            sampler = RandomSampler(range(self.size), replacement=True, generator=own)
        self._batches = iter(BatchSampler(sampler, self.batch_size, drop_last=True))
        self._seed, self._taken = seed, 0


def _checked(weights: Any, size: int) -> list[float]:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (size,):
        raise SpecError(f"Weights of shape {values.shape} do not fit {size} images.", "Give one per image.")
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
        raise SpecError("Weights must be finite, not negative, and not all 0.")
    return [float(value) for value in values]
