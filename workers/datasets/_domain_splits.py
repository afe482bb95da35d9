"""Options and splits of sets whose domains are held out by name: DomainBed's image sets as ordinary data sets.

The target domains are halved into ``test_support`` (to be used without labels) and ``test``; every other domain gives
a part to ``id_val`` and the rest to ``train``. ``val`` is a whole further domain when ``validation`` names one, and
otherwise the same rows as ``id_val``. DomainBed's own protocol ignores these splits and makes its own from the rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import DataError
from workers.datasets._arrays import held_out
from workers.datasets.base import IntArray


class DomainOptions(BaseModel):
    """What a user may choose; every set narrows ``target`` and ``validation`` to its own domains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str | tuple[str, ...] = Field(description="domain (or domains) held out for testing")
    validation: str | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the splits")
    per_domain: int | None = Field(None, ge=10, description="images of each domain at most (random choice); null: all")
    id_fraction: float = Field(0.2, gt=0, lt=1, description="share of every source domain kept as `id_val`")
    support_fraction: float = Field(0.5, gt=0, lt=1, description="share of the target given as `test_support`")

    @property
    def targets(self) -> tuple[str, ...]:
        """The held-out domains."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @model_validator(mode="after")
    def _different(self) -> DomainOptions:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"target {list(self.targets)} must be at least one domain, each named once")
        if self.validation in self.targets:
            raise ValueError(f"validation {self.validation!r} is a target as well; choose a different domain")
        return self


def domain_splits(name: str, domain: IntArray, domains: Sequence[str], options: DomainOptions) -> dict[str, IntArray]:
    """Ascending rows of ``train``, ``id_val``, ``val``, ``test_support`` and ``test``.

    What a domain is split into depends on the seed and its name, not on which domains are held out.

    Args:
        name: of the set, for messages.
        domain: number of every row's domain, int64 ``[N]``.
        domains: their names.
        options: what is held out.

    Raises:
        DataError: no domain is left to train on, or one has too few images to be split.
    """
    splits: dict[str, list[IntArray]] = {part: [] for part in ("train", "id_val", "val", "test_support", "test")}
    for number, label in enumerate(domains):
        rng = np.random.default_rng([options.seed, zlib.crc32(label.encode())])
        rows = rng.permutation(np.flatnonzero(domain == number))[: options.per_domain]
        if len(rows) < 2:
            raise DataError(f"{name}: domain {label!r} has {len(rows)} images and cannot be split.")
        if label in options.targets:
            test, support = held_out(rows, options.support_fraction, rng)
            splits["test"].append(test)
            splits["test_support"].append(support)
        elif label == options.validation:
            splits["val"].append(rows)
        else:
            train, id_val = held_out(rows, options.id_fraction, rng)
            splits["train"].append(train)
            splits["id_val"].append(id_val)
    if not splits["train"]:
        raise DataError(
            f"{name}: with target {list(options.targets)} and validation {options.validation!r} no domain is left to "
            "train on.",
            f"Domains: {', '.join(domains)}.",
        )
    if options.validation is None:
        splits["val"] = list(splits["id_val"])
    return {part: np.sort(np.concatenate(rows)).astype(np.int64) for part, rows in splits.items()}
