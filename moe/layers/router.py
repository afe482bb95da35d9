"""Router: from logits to which experts see which token, with what weight, and how balanced the choice is.

:func:`route_tokens` follows a :class:`moe.router_spec.RouterSpec`; :func:`route` is the student block's rule
(DeepSpeed's). Both are made of the same parts: :func:`choose`, the seats of ``moe.layers.seating``, the losses of
``moe.layers.balance``.

Sources: GShard (arXiv 2006.16668, algorithm 1), Switch Transformer (arXiv 2101.03961, equations 2 and 4), V-MoE
(arXiv 2106.05974, batch priority), GMoE (arXiv 2206.04046), EMoE (arXiv 2310.10908), m2mKD (arXiv 2402.16918).

Known differences: equal scores are resolved towards the lower expert number, always (the official code leaves it open).
In evaluation nothing is dropped and nothing is drawn, unless the spec asks for the official capacity.

Shapes: N tokens, E experts, K choices per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.errors import SpecError
from moe.layers import balance as losses
from moe.layers.balance import balance_loss
from moe.layers.seating import (
    by_importance,
    capacity,
    count_choices,
    fastmoe_capacity,
    official_load,
    seats,
    tutel_capacity,
)
from moe.router_spec import RouterSpec

__all__ = ["Routing", "balance_loss", "capacity", "choose", "draw_noise", "route", "route_scores", "route_tokens"]

TUTEL = ("linear", "cosine", "avg_k")


class Routing(NamedTuple):
    """A routing decision.

    Attributes:
        experts_NK: int64, chosen experts, best first.
        weights_NK: float, factor of each chosen expert; 0 where the choice was dropped.
        kept_NK: bool, False where an expert had no seat left.
        balance: scalar balance loss, unweighted.
        counts_E: int64, kept choices by expert.
        gates_NK: the factors before anything was dropped.
        seats_NK: int64, seat of each choice at its expert; None when seats were not counted.
        capacity: int64 scalar, seats per expert; None when nothing is dropped.
    """

    experts_NK: Tensor
    weights_NK: Tensor
    kept_NK: Tensor
    balance: Tensor
    counts_E: Tensor
    gates_NK: Tensor | None = None
    seats_NK: Tensor | None = None
    capacity: Tensor | None = None


def choose(values_NE: Tensor, top_k: int) -> Tensor:
    """The ``min(top_k, E)`` experts with the largest values, best first; equal values: the lower number first."""
    if top_k == 1:
        return values_NE.argmax(dim=-1, keepdim=True)
    return values_NE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def route(logits_NE: Tensor, top_k: int, slots: int | None = None) -> Routing:
    """Choose ``top_k`` experts per token as DeepSpeed does.

    Args:
        logits_NE: gate scores, float32 or wider.
        top_k: choices K per token, 1..E. One choice is weighted by its probability, several are renormalised to sum
            to 1 over the choices that were kept.
        slots: most tokens an expert may take; None drops nothing, and then each token's result is independent of the
            other tokens.

    Returns:
        The decision, with :func:`moe.layers.balance.balance_loss`.
    """
    gates_NE = logits_NE.softmax(dim=-1)
    chosen_NK = choose(logits_NE, top_k)
    raw_NK = gates_NE.gather(1, chosen_NK)
    experts = logits_NE.shape[1]
    routing = _seated(chosen_NK, raw_NK, experts, None if slots is None else seats(chosen_NK, experts), slots)
    weights_NK = routing.weights_NK
    if top_k > 1:
        floor = torch.finfo(weights_NK.dtype).eps
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True).clamp_min(floor)
    return routing._replace(weights_NK=weights_NK, balance=balance_loss(gates_NE, chosen_NK))


def route_scores(scores_NE: Tensor, spec: RouterSpec, factor: float | None) -> Routing:
    """Tutel's rule: the K best scores, their weights, and seats rank by rank. The balance loss is left at 0.

    Args:
        scores_NE: probabilities ``[N, E]``.
        spec: ``top_k`` (at most E count), weights, order, alignment.
        factor: capacity factor; None drops nothing.
    """
    tokens, experts = scores_NE.shape
    chosen_NK = choose(scores_NE, spec.top_k)
    top_k = chosen_NK.shape[1]
    gates_NK = scores_NE.gather(1, chosen_NK)
    if spec.one_score:
        gates_NK = torch.ones_like(gates_NK)
    elif top_k > 1 and spec.normalize_gates:
        gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    if factor is None:
        return _seated(chosen_NK, gates_NK, experts, None, None)
    first_N = by_importance(scores_NE) if spec.batch_prioritized else None
    seats_NK = seats(chosen_NK, experts, "rank", first_N)
    if spec.official_load and spec.batch_prioritized:
        load_E = official_load(chosen_NK, seats_NK, experts)
    else:
        load_E = count_choices(chosen_NK, experts)
    limit = tutel_capacity(factor, tokens, top_k, load_E, spec.alignment)
    return _seated(chosen_NK, gates_NK, experts, seats_NK, limit)


def route_tokens(
    logits_NE: Tensor,
    spec: RouterSpec,
    *,
    training: bool,
    noise: Tensor | None = None,
    deviation_NE: Tensor | None = None,
) -> tuple[Routing, Tensor]:
    """Route by a spec.

    Args:
        logits_NE: the gate's logits, float32 or wider.
        spec: the rule.
        training: add noise, and apply capacity.
        noise: raw draws, see :func:`draw_noise`; None where the rule draws nothing.
        deviation_NE: the noisy gate's standard deviations.

    Returns:
        The decision with its balance loss, and the probabilities of all experts ``[N, E]`` that it was made on.

    Raises:
        SpecError: the rule needs draws (or deviations) that were not given, or they have another shape.
    """
    shape = noise_shape(spec, logits_NE, training)
    if shape is not None and (noise is None or tuple(noise.shape) != shape):
        given = "nothing" if noise is None else f"shape {tuple(noise.shape)}"
        raise SpecError(f"The {spec.gate} gate needs draws of shape {shape}; got {given}.", "See draw_noise.")
    drawn = noise if shape is not None else None
    factor = _factor(spec, training)
    if spec.gate in TUTEL:
        return _tutel(logits_NE, spec, factor, drawn)
    if spec.gate == "switch":
        return _switch(logits_NE, spec, factor, drawn)
    if spec.gate == "noisy":
        if drawn is not None and deviation_NE is None:
            raise SpecError("The noisy gate needs the deviations of its noise.", "Pass gate.deviation(x).")
        return _noisy(logits_NE, spec, deviation_NE, drawn)
    return _naive(logits_NE, spec, factor, drawn)


def noise_shape(spec: RouterSpec, logits_NE: Tensor, training: bool) -> tuple[int, ...] | None:
    """Shape of the draws that :func:`route_tokens` needs; None when it draws nothing."""
    tokens, experts = logits_NE.shape
    if spec.random_routing and (training or spec.eval_capacity):
        return (tokens,)
    everywhere = spec.gate == "noisy" or (spec.gate == "switch" and spec.switch_eps > 0) or spec.noise > 0
    return (tokens, experts) if training and everywhere else None


def draw_noise(
    spec: RouterSpec, logits_NE: Tensor, training: bool, generator: torch.Generator | None = None
) -> Tensor | None:
    """The draws of one pass: uniform in [0, 1) for the switch gate and random routing, else standard normal."""
    shape = noise_shape(spec, logits_NE, training)
    if shape is None:
        return None
    uniform = spec.random_routing or spec.gate == "switch"
    draw = torch.rand if uniform else torch.randn
    return draw(shape, generator=generator, device=logits_NE.device, dtype=logits_NE.dtype)


def _factor(spec: RouterSpec, training: bool) -> float | None:
    if training:
        return spec.capacity_factor
    if not spec.eval_capacity:
        return None
    return spec.capacity_factor if spec.eval_capacity_factor is None else spec.eval_capacity_factor


def _tutel(logits_NE: Tensor, spec: RouterSpec, factor: float | None, noise: Tensor | None) -> tuple[Routing, Tensor]:
    noisy_NE = logits_NE if noise is None else logits_NE + spec.noise * noise / logits_NE.shape[1]
    scores_NE = noisy_NE.softmax(dim=-1)
    routing = route_scores(scores_NE, spec, factor)
    if spec.balance == "load_importance":
        last_N = noisy_NE.gather(1, routing.experts_NK[:, -1:]).squeeze(1)
        clean_NE = scores_NE if noise is None else logits_NE.softmax(dim=-1)
        balance = losses.load_importance_loss(clean_NE, last_N, spec.noise)
    else:
        balance = _plain_balance(scores_NE, spec, routing)
    return routing._replace(balance=balance), scores_NE


def _naive(logits_NE: Tensor, spec: RouterSpec, factor: float | None, noise: Tensor | None) -> tuple[Routing, Tensor]:
    experts = logits_NE.shape[1]
    chosen_NK = choose(logits_NE, spec.top_k)
    gates_NK = logits_NE.gather(1, chosen_NK).softmax(dim=-1)
    routing = _first_come(chosen_NK, gates_NK, spec, experts, factor)
    if noise is not None:
        # The second expert is visited with probability 2 * weight; pruning by capacity comes first.
        visit_N = 2.0 * gates_NK.detach()[:, 1] >= noise
        kept_NK = torch.stack([routing.kept_NK[:, 0], routing.kept_NK[:, 1] & visit_N], dim=1)
        routing = _kept(routing, kept_NK, experts)
    scores_NE = logits_NE.softmax(dim=-1)
    return routing._replace(balance=_plain_balance(scores_NE, spec, routing)), scores_NE


def _switch(logits_NE: Tensor, spec: RouterSpec, factor: float | None, noise: Tensor | None) -> tuple[Routing, Tensor]:
    if noise is not None:
        logits_NE = logits_NE + (noise * (2.0 * spec.switch_eps) + (1.0 - spec.switch_eps))
    scores_NE = logits_NE.softmax(dim=-1)
    chosen_N1 = choose(scores_NE, 1)
    routing = _first_come(chosen_N1, scores_NE.gather(1, chosen_N1), spec, scores_NE.shape[1], factor)
    return routing._replace(balance=_plain_balance(scores_NE, spec, routing)), scores_NE


def _noisy(
    clean_NE: Tensor, spec: RouterSpec, deviation_NE: Tensor | None, noise: Tensor | None
) -> tuple[Routing, Tensor]:
    if noise is None or deviation_NE is None:
        noisy_NE, deviation_NE = clean_NE, None
    else:
        noisy_NE = clean_NE + noise * deviation_NE
    order_NE = choose(noisy_NE, spec.top_k + 1)
    chosen_NK = order_NE[:, : spec.top_k]
    gates_NK = noisy_NE.gather(1, chosen_NK).softmax(dim=-1)
    routing = _seated(chosen_NK, gates_NK, clean_NE.shape[1], None, None)
    scores_NE = noisy_NE.softmax(dim=-1)
    if spec.balance == "noisy":
        balance = losses.noisy_loss(clean_NE, noisy_NE, deviation_NE, order_NE, chosen_NK.shape[1])
    else:
        balance = _plain_balance(scores_NE, spec, routing)
    return routing._replace(balance=balance), scores_NE


def _plain_balance(scores_NE: Tensor, spec: RouterSpec, routing: Routing) -> Tensor:
    if spec.balance == "gshard":
        return losses.gshard_loss(scores_NE, routing.experts_NK)
    if spec.balance == "switch":
        return losses.switch_loss(scores_NE, routing.counts_E)
    return scores_NE.new_zeros(())


def _first_come(chosen_NK: Tensor, gates_NK: Tensor, spec: RouterSpec, experts: int, factor: float | None) -> Routing:
    """Fastmoe's seating: token by token, choice by choice."""
    if factor is None:
        return _seated(chosen_NK, gates_NK, experts, None, None)
    limit = fastmoe_capacity(spec.gate, chosen_NK.shape[0], experts, factor)
    return _seated(chosen_NK, gates_NK, experts, seats(chosen_NK, experts, "token"), limit)


def _seated(
    chosen_NK: Tensor, gates_NK: Tensor, experts: int, seats_NK: Tensor | None, limit: Tensor | int | None
) -> Routing:
    """Assemble a decision; seats from ``limit`` on do not exist."""
    nothing = gates_NK.new_zeros(())
    if seats_NK is None or limit is None:
        kept_NK = torch.ones_like(chosen_NK, dtype=torch.bool)
        counts_E = count_choices(chosen_NK, experts)
        return Routing(chosen_NK, gates_NK, kept_NK, nothing, counts_E, gates_NK, seats_NK, None)
    if not isinstance(limit, Tensor):
        limit = torch.full((), limit, dtype=torch.long, device=chosen_NK.device)
    empty = Routing(chosen_NK, gates_NK, seats_NK < limit, nothing, seats_NK, gates_NK, seats_NK, limit)
    return _kept(empty, empty.kept_NK, experts)


def _kept(routing: Routing, kept_NK: Tensor, experts: int) -> Routing:
    """The decision with only the choices of ``kept_NK`` left."""
    gates_NK = routing.weights_NK if routing.gates_NK is None else routing.gates_NK
    counted_NK = torch.where(kept_NK, routing.experts_NK, experts)
    counts_E = count_choices(counted_NK, experts + 1)[:experts]
    return routing._replace(weights_NK=gates_NK * kept_NK, kept_NK=kept_NK, counts_E=counts_E)
