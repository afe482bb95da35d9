"""Which images of a domain are trained on, held out, or given without labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.errors import SpecError
from workers.domainbed.seeds import seed_hash

IntArray = NDArray[np.int64]


class DomainSplit(NamedTuple):
    """Rows of one domain, int64, in the official (shuffled) order.

    Attributes:
        in_: trained on, or tested on where the domain is held out.
        out: validation of a training domain; of a test domain for the oracle only.
        uda: unlabelled rows of a test domain for adaptation; empty without.
    """

    in_: IntArray
    out: IntArray
    uda: IntArray


def split_domain(
    size: int, trial_seed: int, environment: int, holdout_fraction: float = 0.2, uda_fraction: float = 0.0
) -> DomainSplit:
    """Split rows 0 .. size - 1 of a domain.

    The first ``int(size * holdout_fraction)`` rows of a shuffle are ``out``. Then ``in`` is shuffled with the same seed
    and its first ``int(len(in) * uda_fraction)`` become ``uda``. In the protocol only test domains have ``uda``.

    Args:
        size: images of the domain.
        trial_seed: 0, 1, 2 in a sweep.
        environment: number of the domain.
        holdout_fraction: in [0, 1].
        uda_fraction: in [0, 1].

    Raises:
        SpecError: a fraction outside [0, 1], or a negative size.
    """
    for name, value in (("holdout_fraction", holdout_fraction), ("uda_fraction", uda_fraction)):
        if not 0 <= value <= 1:
            raise SpecError(f"{name} is {value}.", "It is a share of a domain: from 0 to 1.")
    if size < 0:
        raise SpecError(f"A domain cannot have {size} images.")
    seed = seed_hash(trial_seed, environment)
    keys = _shuffled(size, seed)
    held = int(size * holdout_fraction)
    out, rest = keys[:held], keys[held:]
    if uda_fraction == 0:
        return DomainSplit(rest, out, keys[:0])
    positions = _shuffled(len(rest), seed)
    count = int(len(rest) * uda_fraction)
    return DomainSplit(rest[positions[count:]], out, rest[positions[:count]])


def _shuffled(size: int, seed: int) -> IntArray:
    keys = np.arange(size, dtype=np.int64)
    np.random.RandomState(seed).shuffle(keys)
    return keys
