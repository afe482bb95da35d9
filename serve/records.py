"""What is known of a domain's state, and which names are allowed: plain records, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from moe.errors import NotFoundError, SpecError

Kind = Literal["delta", "features"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_REFERENCE = re.compile(r"(?P<name>[^.]*)(?:\.(?P<version>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Facts:
    """How a state came about; written by whoever publishes it.

    Attributes:
        model_version: digest of the base model.
        method: adaptation method.
        options: its options, as far as they differ from the defaults.
        support: number of support images.
        loss_before: the method's objective before the first step, if it has one.
        loss_after: the same after the last step, if it was computed.
        expert_weights: mean attention that each expert got, if there are experts.
        collapse: result of the collapse guard, plain JSON.
        seconds: time spent on the adaptation.
    """

    model_version: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    support: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    expert_weights: tuple[float, ...] = ()
    collapse: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class StateRecord:
    """One version of one state.

    Attributes:
        tenant: owner.
        name: of the domain.
        version: 1, 2, ...; never used again, also after a deletion.
        created: seconds since 1970.
        bytes: size of the delta in memory.
        digest: hex sha256 of the delta's canonical bytes.
        kind: ``delta`` (kept as tensors) or ``features`` (kept as its support features and recomputed).
        pinned: never evicted.
        current: what ``NAME`` without a version means now.
        stored_bytes: size of its file.

    The others are those of :class:`Facts`.
    """

    tenant: str
    name: str
    version: int
    model_version: str
    method: str
    created: float
    support: int
    loss_before: float | None
    loss_after: float | None
    expert_weights: tuple[float, ...]
    collapse: Mapping[str, Any]
    seconds: float
    bytes: int
    digest: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    stored_bytes: int = 0
    pinned: bool = False
    current: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN and infinity become null."""
        value: dict[str, Any] = _finite(asdict(self))
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> StateRecord:
        """Inverse of :meth:`to_json`; fields of later versions are left out. Raises TypeError, KeyError."""
        known = {item.name for item in fields(StateRecord)}
        kept = {key: part for key, part in value.items() if key in known}
        return StateRecord(**{**kept, "expert_weights": tuple(kept["expert_weights"])})


def check_state_name(name: str, what: str = "state") -> str:
    """Return ``name`` when it can be a folder and part of a URL.

    Raises:
        SpecError: anything but 1 to 64 letters, digits, ``-`` and ``_``, beginning with a letter or digit.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(
            f"{str(name)[:80]!r} is not allowed as the name of a {what}.",
            "Use 1 to 64 letters, digits, '-' and '_'; begin with a letter or digit.",
        )
    return name


def parse_reference(text: str) -> tuple[str, int | None]:
    """``NAME`` or ``NAME.VERSION`` -> (name, version or None for the current one).

    Raises:
        SpecError: neither.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise SpecError(f"{text[:80]!r} is not the name of a state.", "Write NAME or NAME.VERSION.")
    version = match["version"]
    return check_state_name(match["name"]), None if version is None else int(version)


def no_such_state(name: str, version: int | None = None, hint: str = "") -> NotFoundError:
    """The error for a state that this tenant does not have, whoever else may."""
    which = name if version is None else f"{name}.{version}"
    return NotFoundError(f"There is no state {which!r}.", hint or "GET /v1/states lists yours.")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
