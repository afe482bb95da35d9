"""Neuron lists of the simplified recycling tool: only layers with experts, several sizes, neurons only.

Source: the second generation of MoE Jetpack's public tool (arXiv 2406.04801). Parity: its order of draws, its rounding
and its number of drawn parts.

Differs: graph selection with ``across_layers`` works (one graph, the mean over layers of co-activation shares); the
public tool fails on it.

Shapes: E experts, k kept neurons, n neurons, q parts of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.conversion.recycle.indices import Lists, Partitioner, divided_graph, top_list, uniform_list
from moe.errors import DataError, SpecError, nearest

METHODS = ("graph", "importance", "random", "uniform")
SHARE_FLOOR = 1e-8


@dataclass(frozen=True)
class NeuronPlan:
    """What lists are wanted.

    Attributes:
        method: one of :data:`METHODS`.
        total: neurons n.
        ratio: share kept, in (0, 1]: ``k = max(1, int(n * ratio))``.
        layers: number of layers.
        moe_layers: layers that get lists.
        experts: lists E per such layer.
        across_layers: importance and graph: one statistic for all layers, the mean of the layers' shares.
    """

    method: str
    total: int
    ratio: float
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    across_layers: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SpecError(f"There is no selection method {self.method!r}.", nearest(self.method, METHODS))
        if not 0 < self.ratio <= 1 or self.total < 1 or self.experts < 1:
            raise SpecError(
                f"A ratio of {self.ratio} of {self.total} neurons for {self.experts} experts is out of range.",
                "The ratio lies in (0, 1]; an expert is never larger than its predecessor.",
            )
        outside = [layer for layer in self.moe_layers if not 0 <= layer < self.layers]
        if outside:
            raise SpecError(f"Expert layers {outside} do not exist: layers are 0..{self.layers - 1}.")

    @property
    def keep(self) -> int:
        """Neurons k of an expert."""
        return max(1, int(self.total * self.ratio))


def neuron_lists(
    plan: NeuronPlan,
    generator: torch.Generator,
    statistics: Mapping[int, Tensor] | None = None,
    partition: Partitioner | None = None,
) -> tuple[Lists, dict[int, Tensor]]:
    """Lists of every expert layer.

    Args:
        plan: what is wanted.
        generator: source of the draws (CPU).
        statistics: layer -> ``[n]`` for importance, ``[n, n]`` for graph, of all layers.
        partition: partitioner of the method graph.

    Returns:
        Layer -> int64 ``[E, k]`` ascending; and, for graph, layer -> part probabilities of all layers.

    Raises:
        DataError: statistics are missing or of another size, or the drawn parts hold fewer than k neurons.
        SpecError: the method graph without a partitioner.
    """
    layers = sorted(set(plan.moe_layers))
    if plan.method == "graph":
        if partition is None:
            raise SpecError("The method 'graph' needs a partitioner.", "Give one, for example graph.partition.")
        return _graph(plan, generator, _needed(plan, statistics), partition)
    if plan.method == "uniform":
        units = torch.unique(uniform_list(plan.total, plan.keep, "truncate"))
        return {layer: units.expand(plan.experts, -1).clone() for layer in layers}, {}
    if plan.method == "random":
        return {layer: _random(plan, generator) for layer in layers}, {}
    values = _needed(plan, statistics)
    if plan.across_layers:
        units = top_list(_mean_share(values), plan.keep)
        return {layer: units.expand(plan.experts, -1).clone() for layer in layers}, {}
    return {layer: _important(plan, generator, values[layer]) for layer in layers}, {}


def _random(plan: NeuronPlan, generator: torch.Generator) -> Tensor:
    draws = [torch.randperm(plan.total, generator=generator)[: plan.keep] for _ in range(plan.experts)]
    return torch.stack([units.sort().values for units in draws])


def _important(plan: NeuronPlan, generator: torch.Generator, metric_n: Tensor) -> Tensor:
    if not bool(metric_n.sum() > 0):
        raise DataError("A statistic is zero for all neurons of a layer.", "Collect it with images that activate it.")
    draws = [torch.multinomial(metric_n, plan.keep, generator=generator) for _ in range(plan.experts)]
    return torch.stack([units.sort().values for units in draws])


def _graph(
    plan: NeuronPlan, generator: torch.Generator, co_act: Mapping[int, Tensor], partition: Partitioner
) -> tuple[Lists, dict[int, Tensor]]:
    """Every layer is partitioned in turn; an expert layer draws its lists before the next layer is looked at."""
    lists: Lists = {}
    probabilities: dict[int, Tensor] = {}
    mean = _mean_share(co_act)[0] if plan.across_layers else None
    common = divided_graph(mean, partition, plan.total) if mean is not None else None
    for layer in range(plan.layers):
        parts = common or divided_graph(co_act[layer], partition, plan.total)
        probabilities[layer] = parts.prob_q
        if layer not in plan.moe_layers:
            continue
        count = 3 * int(plan.keep / plan.total * len(parts.members) + 1)
        rows = [parts.draw(count, plan.keep, generator, top_up=False) for _ in range(plan.experts)]
        short = min(len(row) for row in rows)
        if short < plan.keep:
            raise DataError(
                f"Layer {layer}: the drawn parts hold only {short} of the {plan.keep} neurons an expert needs.",
                "Use more balanced parts (METIS), or fewer neurons per expert.",
            )
        lists[layer] = torch.stack(rows)
    return lists, probabilities


def _needed(plan: NeuronPlan, statistics: Mapping[int, Tensor] | None) -> dict[int, Tensor]:
    """The statistics that the plan needs, in float32 and of the right size."""
    given = statistics or {}
    square = plan.method == "graph"
    needed = range(plan.layers) if square or plan.across_layers else sorted(set(plan.moe_layers))
    shape = (plan.total, plan.total) if square else (plan.total,)
    values: dict[int, Tensor] = {}
    for layer in needed:
        if layer not in given or tuple(given[layer].shape) != shape:
            seen = tuple(given[layer].shape) if layer in given else "nothing"
            raise DataError(f"Layer {layer} needs statistics of shape {shape}, but there is {seen}.")
        values[layer] = given[layer].detach().to("cpu", torch.float32)
        if not bool(values[layer].isfinite().all()) or bool((values[layer] < 0).any()):
            raise DataError(f"The statistics of layer {layer} hold negative or non-finite values.")
    return values


def _mean_share(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The mean over layers of each layer's statistic divided by its sum, as a single layer 0."""
    shares = [values[layer] / (values[layer].sum() + SHARE_FLOOR) for layer in sorted(values)]
    return {0: torch.stack(shares).mean(dim=0)}
