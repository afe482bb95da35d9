"""How modular a dense layer already is: what a split and a gate would find and lose, before any training.

Source: EMoE (arXiv 2310.10908, section 5) argues from such figures; MoEfication (arXiv 2110.01786) measures the same
kind. Needs the layer's weights and some hundred of its inputs, and runs on a CPU in seconds.

Shapes: T tokens, F neurons, D width, E experts, s neurons of an expert, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.conversion.split import DenseFFN, check_labels
from moe.errors import SpecError, nearest
from moe.layers.activation import activate, check_activation

Route = Literal["avg_k", "avg_k_bias", "best", "bottom", "random", "fixed"]
ROUTES: tuple[Route, ...] = ("avg_k", "avg_k_bias", "best", "bottom", "random", "fixed")


@dataclass(frozen=True)
class RouteQuality:
    """What K experts of E keep of a layer, averaged over tokens.

    Attributes:
        capture: share of the positive pre-activation mass inside the chosen experts.
        overlap: share of the K experts with the most mass that were chosen.
        error: ``|y_chosen - y| / |y|`` of the output without its bias.
        load_max: most tokens of an expert, relative to an equal share.
    """

    capture: float
    overlap: float
    error: float
    load_max: float


def route_quality(
    dense: DenseFFN,
    labels_F: Tensor,
    x_TD: Tensor,
    num_experts: int,
    top_k: int,
    route: Route = "avg_k",
    activation: str = "gelu",
    seed: int = 0,
) -> RouteQuality:
    """Send each token to K experts and compare with the whole layer.

    Args:
        dense: the layer.
        labels_F: expert of each neuron.
        x_TD: inputs of the layer.
        num_experts: E.
        top_k: K.
        route: ``avg_k`` largest mean key, ``avg_k_bias`` largest mean pre-activation, ``best`` most mass, ``bottom``
            smallest mean key, ``random`` a fresh draw per token, ``fixed`` the same K for all, best on average.
        activation: of the layer.
        seed: of the random route.

    Raises:
        SpecError: labels that are not an equal split, K outside 1..E, or an unknown route.
    """
    check_labels(labels_F, dense.keys_FD.shape[0], num_experts)
    if not 1 <= top_k <= num_experts:
        raise SpecError(f"top_k={top_k} is outside 1..{num_experts}.")
    act = check_activation(activation)
    with torch.no_grad():
        pre_TF = x_TD @ dense.keys_FD.t() + dense.bias_F
        mass_TE = group_sum(pre_TF.clamp_min(0), labels_F, num_experts)
        best_TK = mass_TE.topk(top_k, dim=1).indices
        score_TE = route_scores(dense, labels_F, x_TD, num_experts, route, mass_TE, seed)
        chosen_TK = score_TE.topk(top_k, dim=1).indices
        chosen_TE = torch.zeros_like(mass_TE).scatter_(1, chosen_TK, 1.0)
        best_TE = torch.zeros_like(mass_TE).scatter_(1, best_TK, 1.0)
        hidden_TF = activate(pre_TF, act)
        y_TD = hidden_TF @ dense.values_DF.t()
        lost_TD = (hidden_TF * (1 - chosen_TE[:, labels_F])) @ dense.values_DF.t()
        tiny = torch.finfo(mass_TE.dtype).tiny
        capture_T = (mass_TE * chosen_TE).sum(1) / mass_TE.sum(1).clamp_min(tiny)
        error_T = lost_TD.norm(dim=1) / y_TD.norm(dim=1).clamp_min(tiny)
        load = float(chosen_TE.sum(0).max() * num_experts / (len(x_TD) * top_k))
    overlap = float((chosen_TE * best_TE).sum(1).mean() / top_k)
    return RouteQuality(float(capture_T.mean()), overlap, float(error_T.mean()), load)


def route_scores(
    dense: DenseFFN, labels_F: Tensor, x_TD: Tensor, num_experts: int, route: Route, mass_TE: Tensor, seed: int = 0
) -> Tensor:
    """Scores ``[T, E]`` of a route; the largest are chosen. Arguments as :func:`route_quality`."""
    if route in ("avg_k", "avg_k_bias", "bottom"):
        count = dense.keys_FD.shape[0] // num_experts
        gate_DE = group_sum(dense.keys_FD.t(), labels_F, num_experts) / count
        scores_TE = x_TD @ gate_DE
        if route == "avg_k_bias":
            scores_TE = scores_TE + group_sum(dense.bias_F.unsqueeze(0), labels_F, num_experts) / count
        return -scores_TE if route == "bottom" else scores_TE
    if route == "best":
        return mass_TE
    if route == "random":
        return torch.rand(mass_TE.shape, generator=torch.Generator().manual_seed(seed))
    if route == "fixed":
        share_TE = mass_TE / mass_TE.sum(1, keepdim=True).clamp_min(torch.finfo(mass_TE.dtype).tiny)
        return share_TE.mean(0).expand_as(mass_TE)
    raise SpecError(f"There is no route {route!r}.", nearest(route, ROUTES))


@dataclass(frozen=True)
class Sparsity:
    """How few neurons fire: share of positive pre-activations, and mass held by the top tenth of neurons per token."""

    firing: float
    top_tenth: float


def sparsity(dense: DenseFFN, x_TD: Tensor) -> Sparsity:
    """Measure :class:`Sparsity` on inputs ``[T, D]`` of a layer."""
    with torch.no_grad():
        pre_TF = x_TD @ dense.keys_FD.t() + dense.bias_F
        positive_TF = pre_TF.clamp_min(0)
        top = positive_TF.topk(max(1, pre_TF.shape[1] // 10), dim=1).values.sum(1)
        held = float((top / positive_TF.sum(1).clamp_min(torch.finfo(pre_TF.dtype).tiny)).mean())
        return Sparsity(float((pre_TF > 0).float().mean()), held)


def group_sum(values_TF: Tensor, labels_F: Tensor, num_experts: int) -> Tensor:
    """Sums over the neurons of each expert: ``[T, F]`` to ``[T, E]``."""
    index = labels_F.to(values_TF.device).expand(values_TF.shape[0], -1)
    return values_TF.new_zeros(values_TF.shape[0], num_experts).scatter_add(1, index, values_TF)
