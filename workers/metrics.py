"""Scores of predictions: the public code's and WILDS' definitions, under the names that a dataset's record lists.

``METRICS`` maps every name to its function; a :class:`~workers.datasets.base.DatasetInfo` may list any of them. Names
as in WILDS (``acc_avg``, ``F1-macro_all``, ``acc_wg``, ``r_wg``, ...) follow ``wilds.datasets.*.eval``; the others
follow Meta-DMoE's public code or are ours. They are computed here because WILDS' evaluators need its data sets on disk
and a compiled ``torch_scatter``; tests hold them equal to WILDS' own metric classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError, nearest
from workers.datasets.base import DatasetInfo

Array = NDArray[Any]

# The column whose values are WILDS' evaluation groups.
WILDS_GROUPS: Mapping[str, str] = {
    "camelyon17": "slide",
    "rxrx1": "cell_type",
    "poverty": "urban",
    "iwildcam": "location",
}


@dataclass(frozen=True)
class Scored:
    """Predictions with what a metric may need.

    Attributes:
        predictions: ``[N]`` classes, or values for regression.
        labels: ``[N]`` of the same kind.
        metadata: ``[N, C]`` columns, or None.
        fields: names of the columns.
        value_names: column -> names of its values.
        groups: ``[N]`` adaptation domain per row, or None.
        group_field: column of WILDS' evaluation groups.
    """

    predictions: Array
    labels: Array
    metadata: Array | None = None
    fields: Sequence[str] = ()
    value_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    groups: Array | None = None
    group_field: str = ""

    def column(self, name: str) -> Array:
        """Metadata column ``name`` as int64; SpecError when there is none."""
        if self.metadata is None or name not in self.fields:
            raise SpecError(f"A metric needs the metadata column {name!r}.", nearest(name, self.fields))
        return np.asarray(self.metadata)[:, list(self.fields).index(name)].astype(np.int64)

    @property
    def domains(self) -> Array:
        """Adaptation domain per row; SpecError when there is none."""
        if self.groups is None:
            raise SpecError("A metric over domains needs the domain of every row.", "Pass groups.")
        return np.asarray(self.groups)


def accuracy(predictions: Array, labels: Array) -> float:
    """Share of equal entries."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def group_accuracies(predictions: Array, labels: Array, groups: Array) -> dict[int, float]:
    """Accuracy of every group present, by group id, ascending."""
    correct = (np.asarray(predictions) == np.asarray(labels)).astype(np.float64)
    values, inverse = np.unique(groups, return_inverse=True)
    means = np.bincount(inverse, weights=correct) / np.bincount(inverse)
    return {int(value): float(mean) for value, mean in zip(values, means, strict=True)}


def macro_recall(predictions: Array, labels: Array) -> float:
    """Mean recall over the classes that occur in ``labels``."""
    return float(np.mean(list(group_accuracies(predictions, labels, np.asarray(labels)).values())))


def macro_f1(predictions: Array, labels: Array) -> float:
    """Mean F1 over the classes that occur in ``labels``; a class that is never predicted scores 0."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    classes, true = np.unique(labels, return_inverse=True)
    place = np.minimum(np.searchsorted(classes, predictions), len(classes) - 1)
    known = classes[place] == predictions  # predictions of classes absent from the labels only cost recall
    predicted = np.bincount(place[known], minlength=len(classes))
    hits = np.bincount(true[known & (place == true)], minlength=len(classes))
    return float(np.mean(2 * hits / (predicted + np.bincount(true, minlength=len(classes)))))


def pearson_r(predictions: Array, labels: Array) -> float:
    """Correlation of two vectors; NaN when one of them is constant or has fewer than two entries."""
    a, b = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (predictions, labels))
    if len(a) < 2 or np.all(a == a[0]) or np.all(b == b[0]):
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))


def mean_squared_error(predictions: Array, labels: Array) -> float:
    """Mean of the squared differences."""
    a, b = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (predictions, labels))
    return float(np.mean(np.square(a - b)))


def by_group(
    metric: Callable[[Array, Array], float], predictions: Array, labels: Array, groups: Array
) -> dict[int, float]:
    """``metric`` of every group present, by group id, ascending."""
    values = np.unique(groups)
    return {int(v): metric(np.asarray(predictions)[groups == v], np.asarray(labels)[groups == v]) for v in values}


def _worst_named_region(scored: Scored) -> float:
    """WILDS leaves out regions whose name contains "Other"; with none left the score is 0."""
    names = scored.value_names.get("region", ())
    scores = group_accuracies(scored.predictions, scored.labels, scored.column("region"))
    kept = [s for region, s in scores.items() if not (region < len(names) and "Other" in str(names[region]))]
    return min(kept, default=0.0)


def _worst(metric: Callable[[Array, Array], float], scored: Scored, groups: Array) -> float:
    # np.min, not min: an undefined correlation (NaN) of one group must not be hidden by the order of the groups
    return float(np.min(list(by_group(metric, scored.predictions, scored.labels, groups).values())))


def _over_domains(scored: Scored) -> list[float]:
    return list(group_accuracies(scored.predictions, scored.labels, scored.domains).values())


def _wilds_group(scored: Scored) -> Array:
    return scored.column(scored.group_field) if scored.group_field else scored.domains


METRICS: Mapping[str, Callable[[Scored], float]] = {
    # the public code of Meta-DMoE
    "accuracy": lambda s: accuracy(s.predictions, s.labels),
    "macro_f1": lambda s: macro_f1(s.predictions, s.labels),
    "mean_of_domain_accuracies": lambda s: float(np.mean(_over_domains(s))),
    # Parity: every region counts, "Other" too; WILDS' own definition is acc_worst_region
    "worst_region_accuracy": lambda s: _worst(accuracy, s, s.column("region")),
    # ours
    "worst_domain_accuracy": lambda s: float(np.min(_over_domains(s))),
    "macro_recall": lambda s: macro_recall(s.predictions, s.labels),
    "pearson_r": lambda s: pearson_r(s.predictions, s.labels),
    "worst_group_pearson_r": lambda s: _worst(pearson_r, s, _wilds_group(s)),
    "worst_domain_pearson_r": lambda s: _worst(pearson_r, s, s.domains),
    "mse": lambda s: mean_squared_error(s.predictions, s.labels),
    "negative_mse": lambda s: -mean_squared_error(s.predictions, s.labels),
    # WILDS
    "acc_avg": lambda s: accuracy(s.predictions, s.labels),
    "acc_wg": lambda s: _worst(accuracy, s, _wilds_group(s)),
    "recall-macro_all": lambda s: macro_recall(s.predictions, s.labels),
    "F1-macro_all": lambda s: macro_f1(s.predictions, s.labels),
    "acc_worst_year": lambda s: _worst(accuracy, s, s.column("year")),
    "acc_worst_region": _worst_named_region,
    "mse_avg": lambda s: mean_squared_error(s.predictions, s.labels),
    "mse_wg": lambda s: float(
        np.max(list(by_group(mean_squared_error, s.predictions, s.labels, _wilds_group(s)).values()))
    ),
    "r_all": lambda s: pearson_r(s.predictions, s.labels),
    "r_wg": lambda s: _worst(pearson_r, s, _wilds_group(s)),
}

# Names whose smaller value is the better one; everything else grows with quality.
LOWER_IS_BETTER = frozenset({"mse", "mse_avg", "mse_wg"})


def compute(names: Sequence[str], scored: Scored) -> dict[str, float]:
    """The named metrics, in the order of ``names``.

    Raises:
        SpecError: a name is unknown, or a column that it needs is missing.
        DataError: there is nothing to score, or predictions and labels differ in number.
    """
    if not len(scored.labels) or len(scored.labels) != len(scored.predictions):
        raise DataError(
            f"There are {len(scored.predictions)} predictions for {len(scored.labels)} labels.",
            "Scores need at least one row and one prediction per row.",
        )
    for name in names:
        if name not in METRICS:
            raise SpecError(f"There is no metric named {name!r}.", nearest(name, METRICS))
    return {name: METRICS[name](scored) for name in names}


def score(
    info: DatasetInfo,
    predictions: Array,
    labels: Array,
    metadata: Array | None,
    fields: Sequence[str],
    value_names: Mapping[str, Sequence[str]],
    groups: Array | None,
) -> dict[str, float]:
    """Scores of ``info.metrics`` over some rows; finite numbers.

    Args:
        info: the data set's record: names of its metrics, and which column WILDS groups by.
        predictions: ``[N]`` or ``[N, 1]``, classes (int) or values (regression).
        labels: ``[N]`` or ``[N, 1]``.
        metadata: ``[N, C]`` of the same rows.
        fields: names of the C columns.
        value_names: column -> names of its values.
        groups: ``[N]`` adaptation domain of each row.

    An undefined correlation (constant predictions) counts as 0: it carries no information, and NaN would poison
    selection and JSON (Differs: WILDS reports NaN).
    """
    flat = [np.asarray(values).reshape(len(values)) for values in (predictions, labels)]
    group_field = WILDS_GROUPS.get(info.name, "")
    scored = Scored(
        flat[0], flat[1], metadata, fields, value_names, groups, group_field if group_field in fields else ""
    )
    return {name: 0.0 if np.isnan(value) else value for name, value in compute(info.metrics, scored).items()}


def domain_score(info: DatasetInfo) -> Callable[[Array, Array], float]:
    """The score of one domain: accuracy, or Pearson r for regression with an undefined one counting as 0."""
    if info.task != "regression":
        return accuracy
    return lambda predictions, labels: float(np.nan_to_num(pearson_r(predictions, labels), nan=0.0))
