"""``domain_split.pkl`` of Meta-DMoE's public code, read without running what is in it.

The file is a pickle of a pair: a list of E lists of domain ids, and a dict from domain id to expert. Its name holds
neither E nor the seed, so a stale one is silently taken by the public code; here it is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import CheckpointError, NotFoundError
from workers.sampling import DomainSplit, domain_groups

LARGEST = 1 << 20  # bytes; the official files have a few thousand
_ALLOWED = frozenset({"list", "dict", "int", "tuple"})
_REMEDY = "Copy the file that belongs to these experts."


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, tuples and whole numbers; any other name in the pickle is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in _ALLOWED:
            return {"list": list, "dict": dict, "int": int, "tuple": tuple}[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_split(path: Path, num_experts: int, seed: int | None = None) -> DomainSplit:
    """The domain split in an official file, checked.

    Args:
        path: ``domain_split.pkl``.
        num_experts: number of experts E that it must be made for.
        seed: when given, the split must be the one that this seed makes of its domains.

    Raises:
        NotFoundError: no such file.
        CheckpointError: damaged, not plain lists and numbers (nothing of it is executed), inconsistent, or stale.
    """
    groups, owner = _pair(_plain(path), path)
    if len(groups) != num_experts:
        raise CheckpointError(
            f"{path} is stale: it divides {len(owner)} domains among {len(groups)} experts, not {num_experts}.", _REMEDY
        )
    found = {domain: expert for expert, group in enumerate(groups) for domain in group}
    if found != owner or len(found) != sum(map(len, groups)):
        wrong = sorted({*found.items()} ^ {*owner.items()})[:3] or "a domain is listed twice"
        raise CheckpointError(f"{path} contradicts itself: its lists and its owners differ ({wrong}).", _REMEDY)
    split = DomainSplit(groups, owner)
    if seed is not None and owner and domain_groups(np.array(sorted(owner)), num_experts, seed).owner != owner:
        raise CheckpointError(
            f"{path} is stale: it is not the split that seed {seed} makes of its {len(owner)} domains.",
            f"{_REMEDY} If it does belong to them, pass --keep-split.",
        )
    return split


def split_bytes(split: DomainSplit) -> bytes:
    """The official file's content; the public code reads it with ``pickle.load``."""
    groups = [[int(domain) for domain in group] for group in split.groups]
    return pickle.dumps((groups, {domain: e for e, group in enumerate(groups) for domain in group}), protocol=2)


def _plain(path: Path) -> Any:
    """What the pickle holds."""
    if not path.is_file():
        raise NotFoundError(f"There is no file {path}.", "Check the folder.")
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a domain split has a few thousand.", _REMEDY)
    content = path.read_bytes()
    try:
        _check_memo(content)
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # garbage makes the unpickler raise nearly anything
        raise CheckpointError(
            f"{path} is damaged, or holds more than lists and numbers ({type(error).__name__}: {error}). Nothing of "
            "it was executed.",
            _REMEDY,
        ) from None


def _check_memo(content: bytes) -> None:
    """Refuse memo numbers beyond the file's length: the unpickler would allocate memory up to them."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise pickle.UnpicklingError(f"memo number {argument}")


def _pair(content: Any, path: Path) -> tuple[list[list[int]], dict[int, int]]:
    """The content as groups and owners, when it is of exactly these types."""
    if isinstance(content, tuple | list) and len(content) == 2:
        groups, owner = content
        lists = isinstance(groups, list) and all(isinstance(group, list) and _ids(group) for group in groups)
        if lists and isinstance(owner, dict) and _ids([*owner, *owner.values()]):
            return groups, owner
    raise CheckpointError(f"{path} is not a pair of domain lists and owners (whole numbers from 0).", _REMEDY)


def _ids(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
