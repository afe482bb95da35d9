"""The seed of everything: a hash of what it is for.

One random stream per purpose, named by its arguments, so that adding a hyper-parameter does not move the others.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from moe.errors import SpecError

_PLAIN = (bool, int, float, str, type(None))


def seed_hash(*args: Any) -> int:
    """md5 of the text of ``args`` as a Python tuple, modulo 2**31.

    The text is part of the contract: ``(0, 'lr')``, ``(0,)``, ``()``, lists as lists. Differs: NumPy scalars and arrays
    are first made built-in numbers and lists, whose text does not depend on NumPy's version.

    Args:
        args: numbers, texts, None, and lists and tuples of these.

    Raises:
        SpecError: something else, whose text would not be stable.
    """
    text = str(tuple(builtin(arg) for arg in args))
    return int(hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest(), 16) % 2**31


def builtin(value: Any) -> Any:
    """``value`` with NumPy scalars and arrays turned into built-in numbers and lists, at any depth.

    Raises:
        SpecError: neither number, text, None, list nor tuple.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [builtin(part) for part in value]
    if type(value) is tuple:
        return tuple(builtin(part) for part in value)
    if type(value) in _PLAIN:
        return value
    raise SpecError(
        f"A seed cannot be made from {value!r} of type {type(value).__name__}.",
        "Give numbers, texts, and lists or tuples of these.",
    )
