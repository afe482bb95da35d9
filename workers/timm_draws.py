"""Random draws of timm's image transforms, apart from everybody else's.

timm's transforms draw from the generators of ``random``, numpy and torch that the process shares, so that a thread
that draws meanwhile (a network client that waits a random time, say) changes the images. Here ``random`` is one that
only timm's modules see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def timm_draws() -> Iterator[Callable[[int], None]]:
    """Inside, timm's transforms draw from generators that the function given out seeds; afterwards all are as before.

    The draws of a seed are those of seeding the shared generators with it. Not for two threads at once.
    """
    from timm.data import auto_augment, random_erasing, transforms

    own, kept = random.Random(), np.random.get_state()

    def seeded(seed: int) -> None:
        own.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(np.random.set_state, kept)
        for module in (auto_augment, random_erasing, transforms):
            stack.enter_context(patch.object(module, "random", own))
        yield seeded
