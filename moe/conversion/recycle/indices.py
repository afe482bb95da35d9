"""Which channels or neurons each expert inherits: random, uniform, by importance, by co-activation graph.

An index list names the ``keep`` of ``total`` units that survive, ascending. A layer with experts gets one list per
expert, any other layer a single one.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2. Parity: the order of the draws of the tool that made the released
models, so that a seed gives its lists: layers ascending, experts inside a layer, and a (possibly unused) list for every
layer without experts. The later, simplified tool is ``indices_v2``.

Shapes: E experts, k kept units, n all units, q parts of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.conversion.recycle.graph import part_probabilities
from moe.errors import DataError, SpecError

Lists = dict[int, Tensor]
"""Layer -> int64 ``[E, k]``, or ``[k]`` for a layer without experts."""

Partitioner = Callable[[Tensor], Tensor]
"""Co-activation ``[n, n]`` -> part of every neuron ``[n]``."""


@dataclass(frozen=True)
class ListPlan:
    """What lists are wanted.

    Attributes:
        total: units n to choose from.
        keep: units k that survive, 1..n.
        layers: number of layers.
        moe_layers: layers with experts; without effect for a single expert.
        experts: lists E per such layer.
        shared: all layers without experts share one list (dense channels, which run through the whole network).
    """

    total: int
    keep: int
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    shared: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.total:
            raise SpecError(
                f"{self.keep} of {self.total} units cannot be kept.",
                "The successor must not be larger than the predecessor, nor empty.",
            )
        if self.experts < 1 or self.layers < 1:
            raise SpecError(f"{self.experts} experts in {self.layers} layers: both must be at least 1.")
        outside = [layer for layer in self.moe_layers if not 0 <= layer < self.layers]
        if outside:
            raise SpecError(f"Expert layers {outside} do not exist: layers are 0..{self.layers - 1}.")

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Layers that get a list per expert, ascending."""
        return tuple(sorted(set(self.moe_layers))) if self.experts > 1 else ()


def kept(total: int, ratio: float) -> int:
    """Units that survive: ``int(total * ratio)``."""
    return int(total * ratio)


def random_lists(plan: ListPlan, generator: torch.Generator) -> Lists:
    """The first k of a random permutation, per list."""

    def draw() -> Tensor:
        return torch.randperm(plan.total, generator=generator)[: plan.keep].sort().values

    return _by_layer(plan, lambda _: draw(), draw() if plan.shared else None)


def uniform_list(total: int, keep: int, rounding: str = "round") -> Tensor:
    """Evenly spaced units, int64 ``[k]``.

    Args:
        total: units n.
        keep: units k, 1..n.
        rounding: ``round``: float32 linspace rounded half to even; ``truncate``: the same, truncated; ``floor``:
            ``floor(i * n / k)``.

    Raises:
        SpecError: another rounding, or k out of range.
    """
    if not 1 <= keep <= total:
        raise SpecError(f"{keep} of {total} units cannot be spaced evenly.", "Keep at least 1 and at most all of them.")
    if rounding == "floor":
        return torch.arange(keep) * total // keep
    if rounding not in ("round", "truncate"):
        raise SpecError(f"There is no rounding {rounding!r}.", "Allowed: floor, round, truncate.")
    spaced = torch.linspace(0, total - 1, keep, dtype=torch.float32)
    return (spaced.round() if rounding == "round" else spaced).to(torch.int64)


def uniform_lists(plan: ListPlan, rounding: str = "round") -> Lists:
    """The same evenly spaced list for every layer and expert; see :func:`uniform_list`."""
    units = uniform_list(plan.total, plan.keep, rounding)
    return _by_layer(plan, lambda _: units.clone(), units)


def importance_lists(plan: ListPlan, metric: Mapping[int, Tensor], generator: torch.Generator) -> Lists:
    """Drawn without replacement, in proportion to a statistic of the layer.

    The list that layers without experts share (``plan.shared``) is not drawn: it holds the k units whose statistic,
    summed over all layers, is largest.

    Args:
        plan: what is wanted.
        metric: layer -> non-negative ``[n]``, for every layer that gets a list.
        generator: source of the draws (CPU).

    Raises:
        DataError: a layer is missing, or its statistic has another width, is negative, non-finite or all zero.
    """
    needed = range(plan.layers) if plan.shared or len(plan.expert_layers) < plan.layers else plan.expert_layers
    checked = {layer: _checked_metric(metric, layer, plan.total) for layer in needed}
    shared = top_list(checked, plan.keep) if plan.shared else None

    def draw(layer: int) -> Tensor:
        prob_n = checked[layer] / checked[layer].sum()
        return torch.multinomial(prob_n, plan.keep, generator=generator).sort().values

    return _by_layer(plan, draw, shared)


def top_list(metric: Mapping[int, Tensor], keep: int) -> Tensor:
    """The k units whose statistic, summed over the layers, is largest."""
    total = torch.stack([metric[layer] for layer in sorted(metric)]).sum(dim=0)
    return total.topk(keep).indices.sort().values


def graph_lists(
    plan: ListPlan,
    co_act: Mapping[int, Tensor],
    generator: torch.Generator,
    partition: Partitioner,
    *,
    clusters: int = 32,
    top_up: bool = True,
) -> tuple[Lists, list[Tensor]]:
    """Whole parts of the co-activation graph: half of the parts (and one), drawn by their inner co-activation.

    The members of the drawn parts are joined in the order of the draw and cut to k. With ``plan.shared`` the list of
    the layers without experts comes from one graph, the sum over all layers; otherwise each such layer has a list of
    its own if ``co_act`` holds it, and none if not.

    Args:
        plan: what is wanted.
        co_act: layer -> ``[n, n]``; with ``plan.shared`` an absent layer counts as zero.
        generator: source of the draws (CPU).
        partition: partitioner, called for the shared graph first and then for the layers in ascending order.
        clusters: parts that the partitioner aims at: ``clusters // 2 + 1`` of them are drawn.
        top_up: Differs: when the drawn parts hold fewer than k units, the draw goes on through the other parts. False
            is the public tool: the list stays short.

    Returns:
        The lists, and the part probabilities of every call of the partitioner.

    Raises:
        DataError: a layer is missing or of another size, no part has any inner co-activation, or short lists.
    """
    probabilities: list[Tensor] = []

    def divide(graph_nn: Tensor) -> _Parts:
        parts = _parts(graph_nn, partition, plan.total)
        probabilities.append(parts.prob_q)
        return parts

    def choose(parts: _Parts) -> Tensor:
        return parts.draw(clusters // 2 + 1, plan.keep, generator, top_up)

    lists: Lists = {}
    shared_parts = divide(_summed(co_act, plan.total)) if plan.shared else None
    own = plan.expert_layers if plan.shared else tuple(sorted({*plan.expert_layers, *co_act}))
    missing = [layer for layer in plan.expert_layers if layer not in co_act]
    if missing:
        raise DataError(f"There is no co-activation of layers {missing}.", "Collect the metric co_act for them.")
    divided = {layer: divide(_without_loops(co_act[layer])) for layer in own}
    shared = choose(shared_parts) if shared_parts is not None else None
    for layer in range(plan.layers):
        if layer in plan.expert_layers:
            lists[layer] = _stack([choose(divided[layer]) for _ in range(plan.experts)], layer)
        elif shared is not None:
            lists[layer] = shared.clone()
        elif layer in divided:
            lists[layer] = choose(divided[layer])
    return lists, probabilities


@dataclass(frozen=True)
class _Parts:
    """A partition: members of each part (ascending) and its probability."""

    members: tuple[Tensor, ...]
    prob_q: Tensor

    def draw(self, count: int, keep: int, generator: torch.Generator, top_up: bool) -> Tensor:
        """Draw parts, join their members in the order of the draw, keep the first ``keep``, sort."""
        if not bool(self.prob_q.sum() > 0):
            raise DataError(
                f"None of the {len(self.members)} parts has any co-activation inside: parts cannot be drawn by it.",
                "Use fewer parts (option graph.parts) or select by another statistic.",
            )
        parts = len(self.members)
        wanted = min(count, parts)
        order = torch.multinomial(self.prob_q, parts if top_up else wanted, generator=generator).tolist()
        chosen = order[:wanted]
        for part in order[wanted:]:
            if sum(len(self.members[p]) for p in chosen) >= keep:
                break
            chosen.append(part)
        return torch.cat([self.members[part] for part in chosen])[:keep].sort().values


def divided_graph(co_act_nn: Tensor, partition: Partitioner, total: int) -> _Parts:
    """A layer's graph without loops, partitioned.

    Raises:
        DataError: it is of another size.
    """
    return _parts(_without_loops(co_act_nn), partition, total)


def _parts(graph_nn: Tensor, partition: Partitioner, total: int) -> _Parts:
    if tuple(graph_nn.shape) != (total, total):
        raise DataError(f"A co-activation of shape {tuple(graph_nn.shape)} does not fit {total} units.")
    labels_n = partition(graph_nn)
    ids_q, _, prob_q = part_probabilities(graph_nn, labels_n)
    return _Parts(tuple((labels_n == label).nonzero().squeeze(1) for label in ids_q), prob_q)


def _without_loops(graph_nn: Tensor) -> Tensor:
    return graph_nn.clone().fill_diagonal_(0)


def _summed(co_act: Mapping[int, Tensor], total: int) -> Tensor:
    """Sum over the layers, without loops."""
    graph = torch.zeros(total, total, dtype=torch.float64)
    for layer, own in co_act.items():
        if tuple(own.shape) != (total, total):
            raise DataError(f"The co-activation of layer {layer} has shape {tuple(own.shape)}, not {(total, total)}.")
        graph += own.cpu()
    return graph.fill_diagonal_(0)


def _by_layer(plan: ListPlan, draw: Callable[[int], Tensor], shared: Tensor | None) -> Lists:
    """Lists of all layers; ``shared`` serves the layers without experts when the plan says so."""
    lists: Lists = {}
    for layer in range(plan.layers):
        if layer in plan.expert_layers:
            lists[layer] = torch.stack([draw(layer) for _ in range(plan.experts)])
        else:
            lists[layer] = shared.clone() if plan.shared and shared is not None else draw(layer)
    return lists


def _stack(lists: list[Tensor], layer: int) -> Tensor:
    lengths = {len(units) for units in lists}
    if len(lengths) > 1:
        raise DataError(
            f"The experts of layer {layer} got lists of {min(lengths)} to {max(lengths)} units.",
            "The drawn parts hold too few units: use top_up.",
        )
    return torch.stack(lists)


def _checked_metric(metric: Mapping[int, Tensor], layer: int, total: int) -> Tensor:
    """The statistic of a layer in float32 (draws depend on the type)."""
    if layer not in metric:
        raise DataError(f"There are no statistics of layer {layer}; they cover {sorted(metric)}.")
    value = metric[layer].detach().to("cpu", torch.float32)
    if tuple(value.shape) != (total,):
        raise DataError(f"The statistic of layer {layer} has shape {tuple(value.shape)} instead of {(total,)}.")
    if not bool(value.isfinite().all()) or bool((value < 0).any()) or not bool(value.sum() > 0):
        raise DataError(
            f"The statistic of layer {layer} is negative, non-finite or all zero (sum {float(value.sum()):.3g}).",
            "Collect it again, with images that activate the layer.",
        )
    return value
