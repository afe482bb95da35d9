"""The JSON that ``/v1`` answers with: one source for the server and for the OpenAPI page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from serve.info import ServedInfo
    from serve.records import StateRecord


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Problem(_Answer):
    """What is wrong and what to do."""

    code: str = Field(description="Stable; listed in docs/serving_api.md.")
    message: str
    fix: str
    details: list[str] | None = None


class ErrorAnswer(_Answer):
    """Any answer that is not a success, outside /v2."""

    error: Problem


class ModelAnswer(_Answer):
    """What is served."""

    name: str
    version: str
    task: str
    outputs: int
    class_names: list[str]
    channels: int
    image_size: list[int]
    experts: int
    transform: dict[str, Any]
    methods: dict[str, str | None] = Field(description="Adaptation method: null when usable, else the reason why not.")


class StateAnswer(_Answer):
    """One version of a domain state."""

    name: str
    version: int
    reference: str = Field(description="NAME.VERSION, the model version of the Open Inference Protocol.")
    model_version: str
    method: str
    created: float = Field(description="Seconds since 1970.")
    support: int = Field(description="Images it was adapted to.")
    loss_before: float | None
    loss_after: float | None
    expert_weights: list[float]
    collapse: str = Field(description="Verdict of the collapse guard, in words.")
    collapse_check: dict[str, Any]
    seconds: float
    bytes: int
    digest: str
    kind: str
    pinned: bool
    current: bool


class StatesAnswer(_Answer):
    """All states of the token's tenant."""

    states: list[StateAnswer]


class StateDetails(StateAnswer):
    """A state and the versions that are kept."""

    versions: list[StateAnswer]


class ReportAnswer(_Answer):
    """What an adaptation did."""

    name: str
    method: str
    support: int
    steps: int | None = None
    loss_before: float | None
    loss_after: float | None
    expert_weights: list[float]
    collapse: str
    collapse_check: dict[str, Any]
    collapsed: bool
    dry_run: bool
    kept: bool = Field(description="Whether a new version was published.")
    seconds: float
    version: int | None
    bytes: int | None
    state: StateAnswer | None


class JobAnswer(_Answer):
    """An adaptation that goes on."""

    id: str
    status: Literal["queued", "running", "done", "failed"]
    done: int
    total: int
    report: ReportAnswer | None = None
    error: Problem | None = None


class Prediction(_Answer):
    """One prediction of one image."""

    label: str
    index: int | None
    confidence: float | None
    value: float | None


class PredictedImage(_Answer):
    """One image by the base model and, when a state was asked for, by the state."""

    name: str
    before: Prediction
    after: Prediction | None


class PredictAnswer(_Answer):
    """Predictions in the order of the images."""

    model: str
    model_version: str
    state: str | None = Field(description="NAME.VERSION of the state that served 'after'.")
    predictions: list[PredictedImage]


class StreamPrediction(_Answer):
    """The next images of a stream, predicted by the state after it followed them."""

    model: str
    state: str | None
    predictions: list[Prediction]
    report: ReportAnswer


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None, all the way down."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def model_json(info: ServedInfo) -> dict[str, Any]:
    """:class:`ModelAnswer`."""
    return {
        "name": info.name,
        "version": info.version,
        "task": info.task,
        "outputs": info.outputs,
        "class_names": list(info.class_names),
        "channels": info.channels,
        "image_size": list(info.image_size),
        "experts": info.experts,
        "transform": finite(dict(info.transform)),
        "methods": dict(info.methods),
    }


def state_json(record: StateRecord) -> dict[str, Any]:
    """:class:`StateAnswer`. The tenant is left out."""
    return {
        "name": record.name,
        "version": record.version,
        "reference": f"{record.name}.{record.version}",
        "model_version": record.model_version,
        "method": record.method,
        "created": record.created,
        "support": record.support,
        "loss_before": finite(record.loss_before),
        "loss_after": finite(record.loss_after),
        "expert_weights": [float(weight) for weight in record.expert_weights],
        "collapse": verdict(record.collapse),
        "collapse_check": finite(record.collapse),
        "seconds": record.seconds,
        "bytes": record.bytes,
        "digest": record.digest,
        "kind": record.kind,
        "pinned": record.pinned,
        "current": record.current,
    }


def verdict(collapse: Mapping[str, Any] | None) -> str:
    """The collapse guard's result in words."""
    if not collapse:
        return "not checked"
    if collapse.get("collapsed"):
        return str(collapse.get("reason") or "collapsed")
    return "passed"
