"""The GLUE protocol of EMoE: tasks, metrics, choice of the learning rate, early stopping, and tests out of domain.

Source: EMoE (arXiv 2310.10908, section 4) and its public code; GLUE (arXiv 1804.07461); the sets out of domain follow
GLUE-X (arXiv 2211.08073).

Parity: metrics of a task are averaged, the average selects the epoch and the learning rate; means over seeds come with
the population standard deviation.
Differs: the best score starts at minus infinity (in the public code at 0, so that a run whose Matthews correlation
never exceeds 0 has no result); rows of SNLI without a label are dropped, not counted as wrong; ``cola_ood`` is scored
by Matthews correlation and accuracy, of which GLUE-X and the public code each report one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import SpecError, nearest

Array = NDArray[Any]


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        columns: text columns, one or two.
        metrics: names of its metrics; their mean selects.
        outputs: width of the head (1 is regression with squared error).
        epochs: passes of a full run.
        epochs_lora: passes of a low-rank run.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    outputs: int = 2
    epochs: int = 10
    epochs_lora: int = 20


_PAIR = ("sentence1", "sentence2")

TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), ("accuracy",)),
    "mrpc": GlueTask(_PAIR, ("accuracy", "f1")),
    "stsb": GlueTask(_PAIR, ("pearson", "spearmanr"), outputs=1),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1"), epochs=3, epochs_lora=5),
    "mnli": GlueTask(("premise", "hypothesis"), ("accuracy",), outputs=3, epochs=3, epochs_lora=5),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",), epochs=3, epochs_lora=5),
    "rte": GlueTask(_PAIR, ("accuracy",)),
    "wnli": GlueTask(_PAIR, ("accuracy",)),
}


@dataclass(frozen=True)
class OutOfDomain:
    """A set on which a model trained on another task is tested.

    Attributes:
        trained_on: GLUE task.
        name: the set.
        columns: its text columns.
        split: ``validation``, ``test`` or ``collected`` (distributed by GLUE-X).
        labels: stored label -> the task's label; empty keeps numbers as they are.
        drop: stored labels whose rows do not count.
        metrics: instead of the task's own, when given.
    """

    trained_on: str
    name: str
    columns: tuple[str, ...]
    split: str
    labels: Mapping[Any, int] = field(default_factory=dict)
    drop: tuple[Any, ...] = ()
    metrics: tuple[str, ...] = ()


_ENTAILED = {"entailment": 0, "entails": 0, 0: 0}

OUT_OF_DOMAIN: tuple[OutOfDomain, ...] = (
    OutOfDomain("sst2", "imdb", ("text",), "test"),
    OutOfDomain("sst2", "yelp_polarity", ("text",), "test"),
    OutOfDomain("sst2", "amazon_polarity", ("content",), "test"),
    OutOfDomain("sst2", "flipkart", ("sentence",), "collected"),
    OutOfDomain("cola", "cola_ood", ("sentence",), "collected", metrics=("matthews_correlation", "accuracy")),
    OutOfDomain("mrpc", "twitter", _PAIR, "collected"),
    OutOfDomain("mrpc", "qqp", ("question1", "question2"), "validation"),
    OutOfDomain("qqp", "twitter", _PAIR, "collected"),
    OutOfDomain("qqp", "mrpc", _PAIR, "validation"),
    OutOfDomain("mnli", "mnli_mismatched", ("premise", "hypothesis"), "validation"),
    OutOfDomain("mnli", "snli", ("premise", "hypothesis"), "test", drop=(-1,)),
    OutOfDomain("mnli", "sick", ("sentence_A", "sentence_B"), "test"),
    OutOfDomain("qnli", "qnli_ood", ("question", "sentence"), "collected", {"entailment": 0, "not_entailment": 1}),
    OutOfDomain("rte", "scitail", _PAIR, "collected", {**_ENTAILED, "neutral": 1, "not_entailment": 1, 1: 1}),
    OutOfDomain("rte", "hans", ("premise", "hypothesis"), "validation", {**_ENTAILED, "non-entailment": 1, 1: 1}),
    OutOfDomain("stsb", "sick", ("sentence_A", "sentence_B"), "test"),
)
"""Test sets out of domain, by the task that a model was trained on."""


def task(name: str) -> GlueTask:
    """The task ``name`` (SpecError when there is none)."""
    if name not in TASKS:
        raise SpecError(f"GLUE has no task {name!r} here.", nearest(name, TASKS))
    return TASKS[name]


def glue_metrics(name: str, predictions: Array, references: Array, metrics: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of a task and their mean under ``average``.

    Args:
        name: task.
        predictions: classes ``[N]``, or values for ``stsb``.
        references: true classes or values ``[N]``.
        metrics: names that replace the task's own.

    Raises:
        SpecError: unknown task or metric, no rows, lengths that differ, or values that are not finite.
    """
    wanted = tuple(metrics) or task(name).metrics
    found, true = np.asarray(predictions).reshape(-1), np.asarray(references).reshape(-1)
    if found.shape != true.shape or found.size == 0:
        raise SpecError(f"{found.size} predictions do not fit {true.size} references.", "Give one each, at least one.")
    if not np.isfinite(found.astype(np.float64)).all():
        raise SpecError("Some predictions are not finite.", "Did the training diverge?")
    scores: dict[str, float] = {}
    for metric in wanted:
        if metric not in _METRICS:
            raise SpecError(f"There is no metric {metric!r}.", nearest(metric, _METRICS))
        scores[metric] = _METRICS[metric](found, true)
    return {**scores, "average": float(np.mean(list(scores.values())))}


def map_labels(test: OutOfDomain, labels: Sequence[Any]) -> tuple[Array, Array]:
    """The task's labels of a test set, and which rows count.

    Returns:
        int64 (or float) labels of the rows kept, and their row numbers.

    Raises:
        SpecError: a label that the set's map does not know.
    """
    rows = [row for row, label in enumerate(labels) if label not in test.drop]
    kept = [labels[row] for row in rows]
    if test.labels:
        unknown = {label for label in kept if label not in test.labels}
        if unknown:
            raise SpecError(f"{test.name} has the label {min(unknown, key=str)!r}.", nearest("", map(str, test.labels)))
        kept = [test.labels[label] for label in kept]
    return np.asarray(kept), np.asarray(rows, dtype=np.int64)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate with the best mean over seeds; mean and population standard deviation in percent."""

    value: float
    mean: float
    std: float


def select_lr(best_metric: Array, learning_rates: Sequence[float]) -> LearningRate:
    """The learning rate of the strictly greatest mean; the first of equal ones.

    Args:
        best_metric: fractions ``[learning rates, seeds]``: the best average of each run.
        learning_rates: one a row.

    Raises:
        SpecError: rows and rates do not fit.
    """
    percent = 100.0 * np.asarray(best_metric, dtype=np.float64)
    if percent.ndim != 2 or len(percent) != len(learning_rates) or percent.size == 0:
        raise SpecError(f"Metrics of shape {percent.shape} do not fit {len(learning_rates)} learning rates.")
    means = percent.mean(axis=1)
    best = int(means.argmax())
    return LearningRate(float(learning_rates[best]), float(means[best]), float(percent[best].std()))


@dataclass
class EarlyStopping:
    """Stops after ``patience`` epochs in a row without a better average (the public code: 4).

    Attributes:
        patience: epochs.
        best: best average so far.
        best_epoch: when, counted from 0; -1 before the first.
    """

    patience: int = 4
    best: float = -math.inf
    best_epoch: int = -1
    _epoch: int = -1

    def update(self, average: float) -> bool:
        """Record an epoch; True when training should end."""
        self._epoch += 1
        if average > self.best:
            self.best, self.best_epoch = average, self._epoch
        return self._epoch - self.best_epoch >= self.patience


def friedman_ranks(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Average rank of each method over the test sets, 1 is best; equal scores share their average rank.

    Args:
        scores: method -> one score per set, greater is better, sets in the same order.

    Raises:
        SpecError: methods with different numbers of sets.
    """
    if len({len(values) for values in scores.values()}) != 1:
        raise SpecError("The methods were not scored on the same sets.", "Give one score per set and method.")
    from scipy.stats import rankdata

    ranks = rankdata(-np.asarray(list(scores.values()), dtype=np.float64), axis=0)
    return dict(zip(scores, ranks.mean(axis=1).tolist(), strict=True))


def _accuracy(found: Array, true: Array) -> float:
    return float(np.mean(found == true))


def _f1(found: Array, true: Array) -> float:
    from sklearn.metrics import f1_score

    extra = set(np.unique(np.concatenate([found, true])).tolist()) - {0, 1}
    if extra:
        raise SpecError(f"F1 is for the classes 0 and 1, not {min(extra)}.")
    return float(f1_score(true, found, pos_label=1, zero_division=0))


def _matthews(found: Array, true: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    if min(len(np.unique(found)), len(np.unique(true))) < 2:
        return 0.0  # undefined
    return float(matthews_corrcoef(true, found))


def _pearson(found: Array, true: Array) -> float:
    return _correlation(found, true)


def _spearman(found: Array, true: Array) -> float:
    from scipy.stats import rankdata

    return _correlation(rankdata(found), rankdata(true))


def _correlation(a: Array, b: Array) -> float:
    """Pearson's correlation; 0 when one side does not vary."""
    x, y = a.astype(np.float64) - np.mean(a, dtype=np.float64), b.astype(np.float64) - np.mean(b, dtype=np.float64)
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / scale) if scale > 0 else 0.0


_METRICS: Mapping[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
