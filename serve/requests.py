"""What clients ask of the adapter and what they are told: plain, picklable records."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.records import StateRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class AdaptRequest:
    """What a client wants.

    Attributes:
        tenant: whose state it is.
        name: of the domain.
        method: adaptation method (``moe.adaptation``).
        options: its options, over those learned in training.
        images: uint8 ``[H, W, C]`` or ``[H, W]``, at least one.
        step_cap: most optimiser steps.
        dry_run: compute and report, publish nothing.
        idempotency_key: a second request under the same key gets the first one's report.
    """

    tenant: str
    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[NDArray[Any]] = ()
    step_cap: int | None = None
    dry_run: bool = False
    idempotency_key: str | None = None


@dataclass(frozen=True)
class AdaptReport:
    """What came out.

    Attributes:
        name: of the domain.
        method: that was used.
        support: S.
        steps: optimiser steps that were taken.
        loss_before: the method's objective before, if it has one.
        loss_after: the same after.
        expert_weights: share of the attention that each expert received, or empty.
        collapse: the guard's outcome (:meth:`moe.adaptation.guard.Check.as_dict`).
        seconds: time spent, waiting not included.
        dry_run: nothing was to be published.
        record: the published state; None for a dry run and after a collapse.
        bytes: size of the delta; 0 after a collapse.
        facts: other numbers of the method, e.g. how many images EATA chose; of a stream also ``batches`` and ``moved``.
    """

    name: str
    method: str
    support: int
    steps: int
    loss_before: float | None
    loss_after: float | None
    expert_weights: tuple[float, ...]
    collapse: Mapping[str, Any]
    seconds: float
    dry_run: bool = False
    record: StateRecord | None = None
    bytes: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def collapsed(self) -> bool:
        """The guard dropped the outcome."""
        return bool(self.collapse.get("collapsed"))

    @property
    def kept(self) -> bool:
        """A new version was published."""
        return self.record is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN and infinity become None."""
        plain = {**asdict(self), "record": None if self.record is None else self.record.to_json()}
        plain["expert_weights"] = list(self.expert_weights)
        return {key: _finite(value) for key, value in plain.items()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> AdaptReport:
        """Inverse of :meth:`to_json`."""
        record = value["record"]
        weights = tuple(value["expert_weights"])
        parts = {"expert_weights": weights, "record": None if record is None else StateRecord.from_json(record)}
        return AdaptReport(**{**value, **parts})


def digest_of(images: Sequence[NDArray[Any]]) -> str:
    """Hex sha256 over shapes, types and values of the images, in their order."""
    found = hashlib.sha256()
    for image in images:
        array = np.ascontiguousarray(image)
        found.update(f"{array.shape}{array.dtype.str}".encode())
        found.update(array.data)
    return found.hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value
