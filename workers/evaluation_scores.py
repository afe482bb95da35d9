"""From logits to the rows of a result: metrics, per-domain scores, paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe.losses import predict
from workers.datasets.base import DomainData, IntArray
from workers.evaluation_methods import Method
from workers.evaluation_result import Bounds, LossPair, MethodResult
from workers.intervals import PairedBootstrap, Statistic
from workers.metrics import domain_score, score

Array = NDArray[Any]


@dataclass(frozen=True)
class Scores:
    """Scores of one set of predictions.

    Attributes:
        overall: the data set's metrics over all rows.
        domains: score of each domain (accuracy, or Pearson r).
        mean: their plain mean.
        worst: their minimum.
    """

    overall: dict[str, float]
    domains: list[float]
    mean: float
    worst: float


class Scorer:
    """Scores logits of fixed rows.

    Args:
        data: labels and metadata.
        rows: ``[N]`` rows that the logits belong to.
        groups: ``[N]`` domain of each row.
        order: domain ids in the order of the per-domain lists; ascending by default.
    """

    def __init__(self, data: DomainData, rows: IntArray, groups: IntArray, order: Sequence[int] | None = None) -> None:
        self._data, self._groups = data, groups
        self._labels, self._metadata = data.labels[rows], data.metadata[rows]
        self._order = list(np.unique(groups)) if order is None else list(order)
        self._metric = domain_score(data.info)

    def predictions(self, logits: Array) -> Array:
        """Predictions ``[N]`` of logits ``[N, K]``."""
        return np.asarray(predict(self._data.info.task, torch.from_numpy(np.asarray(logits))).numpy())

    def __call__(self, logits: Array) -> Scores:
        """Scores of logits ``[N, K]``."""
        return self._score(self.predictions(logits), slice(None), self._data.info.metrics)

    def statistic(self, logits: Array) -> Statistic:
        """Row positions -> (selection metric, mean of domains, worst domain), for the bootstrap."""
        predictions, metric = self.predictions(logits), self._data.info.selection_metric

        def values(positions: IntArray) -> NDArray[np.float64]:
            scores = self._score(predictions, positions, (metric,))
            return np.array([scores.overall[metric], scores.mean, scores.worst])

        return values

    def _score(self, predictions: Array, chosen: IntArray | slice, metrics: tuple[str, ...]) -> Scores:
        data, predicted, labels, groups = self._data, predictions[chosen], self._labels[chosen], self._groups[chosen]
        info = replace(data.info, metrics=metrics)
        overall = score(info, predicted, labels, self._metadata[chosen], data.fields, data.value_names, groups)
        order = np.argsort(groups, kind="stable")
        values, starts = np.unique(groups[order], return_index=True)
        parts = np.split(order, starts[1:])
        found = {int(v): self._metric(predicted[p], labels[p]) for v, p in zip(values, parts, strict=True)}
        domains = [found[int(domain)] for domain in self._order]
        return Scores(overall, domains, float(np.mean(domains)), float(np.min(domains)))


def method_results(
    methods: Sequence[Method],
    logits: Mapping[str, Array],
    losses: Mapping[str, Sequence[LossPair]],
    scorer: Scorer,
    metric: str,
    bootstrap: PairedBootstrap | None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> list[MethodResult]:
    """The table's rows.

    Args:
        methods: in order.
        logits: method name -> ``[N, K]``.
        losses: method name -> adaptation loss before and after, per domain.
        scorer: of the rows that the logits belong to.
        metric: the selection metric.
        bootstrap: common resamples for intervals; None leaves them out.
        costs: model (the method without its adaptation) -> what using it costs.
    """
    keys = (metric, "domain_mean", "domain_worst")
    points = {method.name: scorer(logits[method.name]) for method in methods}
    values = {name: np.array([s.overall[metric], s.mean, s.worst]) for name, s in points.items()}
    replicates = {} if bootstrap is None else bootstrap.run({name: scorer.statistic(logits[name]) for name in points})

    def bounds(name: str, reference: str = "") -> dict[str, Bounds]:
        point = values[name] - values[reference] if reference else values[name]
        if bootstrap is None:
            return {key: Bounds(float(v), float(v), float(v)) for key, v in zip(keys, point, strict=True)}
        drawn = replicates[name] - replicates[reference] if reference else replicates[name]
        found = {}
        for index, key in enumerate(keys):
            interval = bootstrap.interval(drawn[:, index])
            found[key] = Bounds(float(point[index]), interval.low, interval.high)
        return found

    return [
        MethodResult(
            name=method.name,
            label=method.label,
            scores=points[method.name].overall,
            domain_scores=points[method.name].domains,
            domain_mean=points[method.name].mean,
            domain_worst=points[method.name].worst,
            intervals=bounds(method.name) if bootstrap is not None else {},
            reference=method.reference,
            gains=bounds(method.name, method.reference) if method.reference else {},
            losses=list(losses.get(method.name, [])),
            cost=dict((costs or {}).get(method.reference or method.name, {})),
        )
        for method in methods
    ]
