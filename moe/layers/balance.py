"""Auxiliary losses that keep the experts evenly loaded; unweighted scalars, differentiable in the gate's numbers.

Counts of chosen experts are constants. One expert cannot be out of balance: a squared coefficient of variation is then
0 (the official code gives NaN). No token at all gives 0.

Sources: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961, equation 4), importance and load (Shazeer et
al., arXiv 1701.06538, appendix A; V-MoE, arXiv 2106.05974, appendix A).

Known differences: the switch loss divides by at least one accepted token; the noisy gate's load in evaluation is the
plain count, where the official code divides 0 by 0.

Shapes: N tokens, E experts, K choices per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.layers.seating import count_choices


def squared_variation(values_E: Tensor) -> Tensor:
    """``Var(v) / (mean(v)^2 + 1e-10)`` with the unbiased variance; 0 for a single value."""
    if values_E.shape[0] == 1:
        return (values_E - values_E).sum()
    return values_E.var(unbiased=True) / (values_E.mean().square() + 1e-10)


def normal_cdf(z: Tensor) -> Tensor:
    """Standard normal distribution function in the form ``(1 + erf(z / sqrt 2)) / 2``."""
    # erfc would be more accurate far out, but moves the loss of nearly empty experts by up to 4e-4 of itself.
    return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))


def gshard_loss(scores_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """``E / N^2 * sum_e (sum_t scores[t, e]) * (tokens whose first choice is e)``; 1 when uniform.

    Args:
        scores_NE: probabilities of all experts.
        experts_NK: chosen experts, best first.
    """
    tokens, experts = scores_NE.shape
    if tokens == 0:
        return scores_NE.sum()
    first_E = count_choices(experts_NK[:, 0], experts).to(scores_NE.dtype)
    return (scores_NE.sum(dim=0) * first_E).sum() * (experts / tokens**2)


def load_importance_loss(scores_NE: Tensor, threshold_N: Tensor, noise: float) -> Tensor:
    """Mean of the variations of importance and of load, as GMoE and EMoE use it.

    Args:
        scores_NE: probabilities without noise. Official: they are compared with a *logit*, scales mixed.
        threshold_N: noisy logit of each token's last chosen expert.
        noise: standard deviation of the noise times E, above 0 (also in evaluation).
    """
    experts = scores_NE.shape[1]
    importance = squared_variation(scores_NE.sum(dim=0))
    load_E = normal_cdf((scores_NE - threshold_N.unsqueeze(1)) / (noise / experts)).sum(dim=0)
    return (importance + squared_variation(load_E)) / 2.0


def switch_loss(scores_NE: Tensor, accepted_E: Tensor) -> Tensor:
    """``E * sum_e f_e P_e``: share of the accepted tokens and summed probability by accepted token (fastmoe).

    Args:
        scores_NE: probabilities of all tokens, accepted or not.
        accepted_E: tokens that each expert had a seat for.
    """
    total = accepted_E.sum().clamp_min(1)
    f_E = accepted_E.to(scores_NE.dtype) / total
    return (f_E * (scores_NE.sum(dim=0) / total)).sum() * scores_NE.shape[1]


def noisy_loss(clean_NE: Tensor, noisy_NE: Tensor, deviation_NE: Tensor | None, order_NE: Tensor, k: int) -> Tensor:
    """Variation of importance plus variation of load of the noisy gate.

    The load of an expert is the probability that a fresh draw of its noise would put it among the K best of the token.

    Args:
        clean_NE: logits without noise.
        noisy_NE: logits with noise.
        deviation_NE: standard deviation of the noise; None in evaluation, where the load is the plain count.
        order_NE: experts of each token by decreasing noisy logit, at least K + 1 of them (K when K = E).
        k: choices K per token.
    """
    chosen_NK = order_NE[:, :k]
    weights_NK = noisy_NE.gather(1, chosen_NK).softmax(dim=-1)
    dense_NE = torch.zeros_like(noisy_NE).scatter(1, chosen_NK, weights_NK)
    if deviation_NE is None or k >= noisy_NE.shape[1]:
        load_E = (dense_NE > 0).sum(dim=0).to(dense_NE.dtype)
    else:
        bounds_N2 = noisy_NE.gather(1, order_NE[:, k - 1 : k + 1])
        stay_N1, enter_N1 = bounds_N2[:, :1], bounds_N2[:, 1:]
        bound_NE = torch.where(noisy_NE > enter_N1, enter_N1, stay_N1)
        load_E = normal_cdf((clean_NE - bound_NE) / deviation_NE).sum(dim=0)
    return squared_variation(dense_NE.sum(dim=0)) + squared_variation(load_E)


def balance_loss(gates_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """``E * sum_e (mean gate of e) * (share of tokens that chose e)``; only the gates carry a gradient.

    The share counts first choices for K = 1 and 2 (Switch, GShard) and all choices, divided by K, above (DeepSpeed).
    """
    tokens, experts = gates_NE.shape
    if tokens == 0:
        return gates_NE.sum()
    counted = chosen_NK[:, :1] if chosen_NK.shape[1] <= 2 else chosen_NK
    share_E = count_choices(counted, experts).to(gates_NE.dtype) / tokens / counted.shape[1]
    return experts * (gates_NE.mean(dim=0) * share_E).sum()
