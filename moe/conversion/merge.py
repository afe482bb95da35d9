"""Experts put back together into the dense layer that they were cut from.

EMoE (arXiv 2310.10908, section 4.3): what the split gains, it gains in training; the merged layer keeps it and runs as
any dense layer does. Note that a merged layer uses all its neurons for every token.

Shapes: F neurons, D width, E experts, s neurons of an expert, K chosen experts.

Differs: the public code has no merge for this layout. The output bias of the merged layer is ``K * mean_e b_e``, exact
while the experts' shares are equal (low-rank tuning, frozen layers) and right on average under uniform routing; with
recorded loads it is weighted by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.conversion.split import DenseFFN, ExpertTensors, neurons_of_experts
from moe.errors import SpecError


@dataclass(frozen=True)
class Merged:
    """A merged layer and how exact it is.

    Attributes:
        dense: the layer, in the layout of linear layers.
        bias_spread: largest deviation of an expert's share of the output bias from the one used; 0 when exact.
        replica_spread: largest deviation between replicas of a neuron; 0 without repeated experts.
    """

    dense: DenseFFN
    bias_spread: float
    replica_spread: float


def bias_remainder(bias_D: Tensor, top_k: int) -> Tensor:
    """What ``K * (b / K)`` loses to rounding, float64 ``[D]``: kept beside the experts it makes the merge bit-exact."""
    return bias_D.double() - (bias_D / top_k).double() * top_k


def merge_experts(
    experts: ExpertTensors,
    labels_F: Tensor,
    top_k: int,
    repeat: int = 1,
    *,
    remainder_D: Tensor | None = None,
    counts_E: Tensor | None = None,
    average_replicas: bool = False,
) -> Merged:
    """The dense layer of all neurons in their original order.

    Args:
        experts: as :func:`moe.conversion.split.gather_experts` makes them.
        labels_F: the labels of the split.
        top_k: K of the split.
        repeat: ``expert_repeat`` of the split.
        remainder_D: :func:`bias_remainder` of the original bias.
        counts_E: choices of each expert; the output bias is their weighted mean. Uniform when left out.
        average_replicas: with ``repeat > 1``, average the replicas of a neuron instead of refusing.

    Raises:
        SpecError: labels and experts do not fit, or replicas of a neuron differ and averaging was not asked for.
    """
    count, size, width = experts.fc1_EsD.shape
    index_Es = neurons_of_experts(labels_F.cpu(), count, repeat).to(experts.fc1_EsD.device)
    if index_Es.shape[1] != size:
        raise SpecError(
            f"The experts have {size} neurons, the labels give each {index_Es.shape[1]}.",
            "Were the experts copies of the whole layer, or cut with another expert_repeat?",
        )
    with torch.no_grad():
        flat = index_Es.reshape(-1)
        keys, spread_1 = _scatter(experts.fc1_EsD.reshape(-1, width), flat, labels_F.numel(), repeat)
        bias, spread_b = _scatter(experts.bias_Es.reshape(-1, 1), flat, labels_F.numel(), repeat)
        values, spread_2 = _scatter(experts.fc2_EsD.reshape(-1, width), flat, labels_F.numel(), repeat)
        spread = max(spread_1, spread_b, spread_2)
        if spread > 0 and not average_replicas:
            raise SpecError(
                f"Replicas of a neuron differ by up to {spread:.3g} (expert_repeat={repeat}), no dense layer is equal.",
                "Ask for average_replicas=True if their mean is good enough.",
            )
        share_D, bias_spread = _share(experts.bias_ED, counts_E)
        out = share_D * top_k
        if remainder_D is not None:
            out = out + remainder_D.to(out)
    dense = DenseFFN(keys, bias.squeeze(1), values.t().contiguous(), out.to(experts.bias_ED.dtype))
    return Merged(dense, bias_spread, spread)


def _scatter(rows_ND: Tensor, neuron_N: Tensor, neurons: int, repeat: int) -> tuple[Tensor, float]:
    """Rows back at their neurons' places; replicas averaged, and how far they lie apart."""
    if repeat == 1:
        out = torch.empty(neurons, rows_ND.shape[1], dtype=rows_ND.dtype, device=rows_ND.device)
        out[neuron_N] = rows_ND.detach()
        return out, 0.0
    replicas = rows_ND.detach()[neuron_N.argsort(stable=True)].view(neurons, repeat, -1)
    spread = float((replicas.amax(1) - replicas.amin(1)).max())
    mean = replicas[:, 0] if spread == 0 else replicas.double().mean(1).to(rows_ND.dtype)
    return mean.clone(), spread


def _share(bias_ED: Tensor, counts_E: Tensor | None) -> tuple[Tensor, float]:
    """The common share of the output bias, float64, and the largest deviation from it."""
    wide = bias_ED.detach().double()
    if bool((wide == wide[:1]).all()):
        return wide[0], 0.0  # a mean of equal numbers may differ from them in the last bit
    weight = torch.ones_like(wide[:, 0]) if counts_E is None else counts_E.to(wide)
    if counts_E is not None and (counts_E.shape != wide.shape[:1] or float(weight.sum()) <= 0):
        raise SpecError(
            f"Counts of shape {tuple(counts_E.shape)} with sum {float(weight.sum())} cannot weight experts."
        )
    share_D = (wide * weight.unsqueeze(1)).sum(0) / weight.sum()
    return share_D, float((wide - share_D).abs().max())
