"""Which adapter answers which operation.

An adapter is a function ``(case, tensors) -> outputs`` registered under ``method.operation``. It maps names and shapes
to the project's own public functions and holds no mathematics. Adapter modules are the files of this folder named
``<method>_<part>.py``; they are imported by themselves, so that a new method is a new file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Adapter = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
Check = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Iterable[str]]

ADAPTERS: dict[str, Adapter] = {}
CHECKS: dict[str, Check] = {}


class Skip(Exception):
    """A case that cannot run here, because it needs data that this machine does not have; the text says which."""


def op(name: str) -> Callable[[Adapter], Adapter]:
    """Register the decorated function as the adapter of operation ``name`` (``method.operation``).

    The function receives the parsed ``case.json`` and the tensors by name. It returns every ``out.*`` tensor under its
    full name and JSON results under ``expected`` or ``expect``, as the case has them.

    Raises:
        ValueError: two adapters claim the same operation.
    """

    def register(adapter: Adapter) -> Adapter:
        if name in ADAPTERS:
            raise ValueError(f"Operation {name!r} has two adapters: {ADAPTERS[name].__module__}, {adapter.__module__}.")
        ADAPTERS[name] = adapter
        return adapter

    return register


def check(name: str) -> Callable[[Check], Check]:
    """Register the decorated function as the comparison of operation ``name``, where the contract has rules of its own.

    It receives ``case.json``, all stored tensors and the adapter's outputs, and yields one complaint a line. Without
    one, results are compared element by element. Only for contracts under which several answers are right.
    """

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"Operation {name!r} has two checks: {CHECKS[name].__module__}, {function.__module__}.")
        CHECKS[name] = function
        return function

    return register


def load_adapters() -> dict[str, Adapter]:
    """Import every adapter module beside this file and return the adapters by operation."""
    for file in sorted(Path(__file__).parent.glob("[!_]*_*.py")):
        if not file.stem.startswith("test_"):
            importlib.import_module(f"{__package__}.{file.stem}")
    return ADAPTERS
