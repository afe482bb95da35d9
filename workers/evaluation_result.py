"""What an evaluation says: plain records that become JSON, and the logits behind them as safetensors.

Nothing in here depends on time, machine or path: the same models and seed give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import CheckpointError, NotFoundError

RESULT_FILE, LOGITS_FILE = "evaluation.json", "logits.safetensors"
FORMAT = 1
LossPair = tuple[float, float | None]


@dataclass(frozen=True)
class Bounds:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MethodResult:
    """One row of the table.

    Attributes:
        name: stable, e.g. ``student_distill``.
        label: for tables and plots.
        scores: the data set's metrics over all scored rows.
        domain_scores: per domain, in the result's order: accuracy, or Pearson r for regression.
        domain_mean: their plain mean.
        domain_worst: their minimum.
        intervals: bootstrap intervals of the selection metric, ``domain_mean`` and ``domain_worst``.
        reference: the method that is the same model without this adaptation, or empty.
        gains: difference to the reference, paired, with intervals: selection metric, ``domain_mean``, ``domain_worst``.
        losses: per domain the adaptation loss before and after its step, where the method has one; after is None where
            the method does not measure it.
        cost: of its model: ``parameters``, ``active_parameters``, ``flops`` (``workers.evaluation_cost``).
    """

    name: str
    label: str
    scores: dict[str, float]
    domain_scores: list[float]
    domain_mean: float
    domain_worst: float
    intervals: dict[str, Bounds] = field(default_factory=dict)
    reference: str = ""
    gains: dict[str, Bounds] = field(default_factory=dict)
    losses: list[LossPair] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Attention:
    """Mean attention that each expert receives: ``mass[domain][expert]``; every row sums to 1."""

    experts: list[str]
    domains: list[str]
    mass: list[list[float]]


@dataclass(frozen=True)
class Curve:
    """Scores of one method after adapting on ``support`` images (0 is the unadapted model)."""

    method: str
    label: str
    support: list[int]
    score: list[float]
    domain_mean: list[float]
    domain_worst: list[float]


@dataclass(frozen=True)
class StreamResult:
    """Scores of one method in one online setting (predict each batch after adapting on it)."""

    setting: str
    method: str
    label: str
    score: float
    domain_mean: float
    domain_worst: float


@dataclass(frozen=True)
class EvaluationResult:
    """Everything about one evaluation of one seed.

    Attributes:
        dataset: registry name.
        title: the data set's title.
        task: ``multiclass``, ``binary`` or ``regression``.
        metric: name of the selection metric.
        protocol: ``official`` or ``split``.
        split: what was scored.
        seed: seed of the models.
        support_size: images that adaptation may use per domain.
        domains: names, in the order of all per-domain lists.
        counts: scored rows per domain.
        support_counts: rows that were adapted on, per domain.
        methods: the table.
        attention: which experts the aggregator listened to, or None.
        curves: adaptation curves.
        streams: online settings.
        settings: what else decided the numbers (JSON).
        rows: scored rows of the data set, grouped by domain.
        logits: method -> float32 ``[N, K]`` for ``rows``; not part of the JSON.
    """

    dataset: str
    title: str
    task: str
    metric: str
    protocol: str
    split: str
    seed: int
    support_size: int
    domains: list[str]
    counts: list[int]
    support_counts: list[int]
    methods: list[MethodResult]
    attention: Attention | None = None
    curves: list[Curve] = field(default_factory=list)
    streams: list[StreamResult] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    logits: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def method(self, name: str) -> MethodResult:
        """The row called ``name`` (NotFoundError when there is none)."""
        for method in self.methods:
            if method.name == name:
                return method
        raise NotFoundError(
            f"The evaluation has no method {name!r}.", f"It has: {', '.join(m.name for m in self.methods)}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the logits."""
        shallow = {key: value for key, value in self.__dict__.items() if key not in ("rows", "logits")}
        plain = {key: asdict(_Holder(value))["value"] for key, value in shallow.items()}
        return {"format": FORMAT, **plain, "rows": self.rows.tolist()}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> EvaluationResult:
        """Inverse of :meth:`to_json`.

        Raises:
            CheckpointError: written by another version, or not such a record.
        """
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"The evaluation record has format {record.get('format')!r}, this version reads {FORMAT}.",
                "Run the evaluate stage again.",
            )
        values = {key: value for key, value in record.items() if key != "format"}
        methods = []
        for method in values.pop("methods"):
            bounds = {key: {k: Bounds(**v) for k, v in method[key].items()} for key in ("intervals", "gains")}
            methods.append(MethodResult(**{**method, **bounds, "losses": [tuple(pair) for pair in method["losses"]]}))
        attention = values.pop("attention")
        return EvaluationResult(
            methods=methods,
            attention=None if attention is None else Attention(**attention),
            curves=[Curve(**curve) for curve in values.pop("curves")],
            streams=[StreamResult(**stream) for stream in values.pop("streams")],
            rows=np.asarray(values.pop("rows"), dtype=np.int64),
            **values,
        )

    def save(self, folder: Path) -> None:
        """Write ``evaluation.json`` and ``logits.safetensors`` into ``folder``, each atomically."""
        import torch

        from workers.modelfile import save_tensors

        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False)
        aside = folder / f".{RESULT_FILE}.{os.getpid()}"
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, folder / RESULT_FILE)
        arrays = {name: torch.from_numpy(np.array(values)) for name, values in self.logits.items()}
        save_tensors(folder / LOGITS_FILE, {**arrays, "rows": torch.from_numpy(self.rows)})

    @staticmethod
    def load(folder: Path) -> EvaluationResult:
        """Read what :meth:`save` wrote, with the logits if they are there.

        Raises:
            NotFoundError: there is no evaluation in ``folder``.
            CheckpointError: the files are damaged or of another version.
        """
        from workers.modelfile import load_tensors

        path = folder / RESULT_FILE
        if not path.exists():
            raise NotFoundError(f"{folder} holds no {RESULT_FILE}.", "Give the folder of a metrics artifact.")
        try:
            result = EvaluationResult.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error}.", "Run the evaluate stage again.") from error
        if not (folder / LOGITS_FILE).exists():
            return result
        arrays = {name: value.numpy() for name, value in load_tensors(folder / LOGITS_FILE).items() if name != "rows"}
        return EvaluationResult(**{**result.__dict__, "logits": arrays})


@dataclass(frozen=True)
class _Holder:
    """Lets ``asdict`` walk lists of records."""

    value: Any


def order_of(results: Sequence[EvaluationResult]) -> list[tuple[str, str]]:
    """(name, label) of every method of several results, in order of first appearance."""
    found: dict[str, str] = {}
    for result in results:
        for method in result.methods:
            found.setdefault(method.name, method.label)
    return list(found.items())
