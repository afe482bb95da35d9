"""Whether something draws from Python's shared generator."""

from __future__ import annotations

import random
from collections.abc import Callable


def leaves_random_alone(act: Callable[[], object], tries: int = 5) -> bool:
    """Whether Python's generator is the same before and after ``act``.

    Threads that earlier tests left in the process may draw from it as well, but not during every try.
    """
    for _ in range(tries):
        before = random.getstate()
        act()
        if random.getstate() == before:
            return True
    return False
