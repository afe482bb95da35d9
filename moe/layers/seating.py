"""Seats: in which order tokens sit down at the experts of their choice, and how many seats an expert has.

GShard's rule (arXiv 2006.16668, algorithm 1) seats all first choices before any second one; V-MoE's batch priority
(arXiv 2106.05974, section 4) seats the tokens with the best score first. fastmoe walks token by token instead.

The seat of a choice is found by one stable sort, not by a cumulative sum over a ``[K N, E]`` table, so that the work
does not grow with the number of experts. Nothing here reads a tensor on the host.

Known differences: the load behind a capacity factor of 0 or below is the true one. The official code (Tutel) reads,
under batch priority, a count that misses most of it, and then drops tokens although the factor promises room for all;
:func:`official_load` reproduces that count.

Shapes: N tokens, E experts, K choices per token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Order = Literal["rank", "token"]


def count_choices(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs: int64 ``[E]``."""
    flat = experts.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.long, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))


def by_importance(scores_NE: Tensor) -> Tensor:
    """Tokens by decreasing best score, int64 ``[N]``; equal scores keep token order."""
    return scores_NE.detach().amax(dim=-1).sort(descending=True, stable=True).indices


def seats(experts_NK: Tensor, num_experts: int, order: Order = "rank", first_N: Tensor | None = None) -> Tensor:
    """Seat number of each choice at its expert, from 0: int64 ``[N, K]``.

    Args:
        experts_NK: int64, chosen experts, best first.
        num_experts: E.
        order: ``rank``: all first choices, then all second ones; ``token``: all choices of a token, then the next.
        first_N: within a rank, the order of the tokens (:func:`by_importance`); token order when left out.
    """
    tokens, top_k = experts_NK.shape
    if order == "token":
        return _running_number(experts_NK.reshape(-1), num_experts).view(tokens, top_k)
    queue_NK = experts_NK if first_N is None else experts_NK.index_select(0, first_N)
    seat_NK = _running_number(queue_NK.t().reshape(-1), num_experts).view(top_k, tokens).t()
    return seat_NK if first_N is None else torch.empty_like(seat_NK).index_copy(0, first_N, seat_NK)


def _running_number(queue: Tensor, num_experts: int) -> Tensor:
    """For each entry, how many earlier entries are equal."""
    grouped, place = queue.sort(stable=True)
    counts_E = count_choices(queue, num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    number = torch.arange(len(queue), device=queue.device) - start_E.index_select(0, grouped)
    return torch.empty_like(number).index_copy(0, place, number)


def official_load(experts_NK: Tensor, seats_NK: Tensor, num_experts: int) -> Tensor:
    """The load that the official code counts under batch priority, int64 ``[E]``: see "Known differences".

    All choices but those of the last rank, plus 1, plus the last token's own place in the queue of its last choice.
    """
    lower_E = count_choices(experts_NK[:, :-1], num_experts)
    if not experts_NK.shape[0]:
        return lower_E
    last = experts_NK[-1:, -1]
    return (lower_E + 1).index_copy(0, last, seats_NK[-1:, -1] + 1)


def tutel_capacity(factor: float, tokens: int, top_k: int, load_E: Tensor, alignment: int = 1) -> Tensor:
    """Seats per expert, int64 scalar: ``K int(f ceil(N / E))`` for a factor f above 0.

    f = 0: as many as the fullest expert needs; f < 0: the same, but at most ``K int(-f ceil(N / E))``. Then rounded up
    to a multiple of ``alignment``.
    """
    bound = top_k * int(abs(factor) * math.ceil(tokens / load_E.shape[0]))
    if factor > 0:
        limit = torch.full((), bound, dtype=torch.long, device=load_E.device)
    else:
        limit = load_E.max() if factor == 0 else load_E.max().clamp(max=bound)
    return (limit + alignment - 1) // alignment * alignment


def capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Seats per expert as DeepSpeed counts them: ``ceil(tokens / experts * factor * top_k)``, at least 1."""
    return max(1, math.ceil(tokens / num_experts * factor * top_k))


def fastmoe_capacity(gate: str, tokens: int, num_experts: int, rate: float) -> int:
    """Seats per expert of fastmoe's gates: gshard ``2 ceil(rate N) // E``, switch ``ceil(rate N / E)``."""
    if gate == "gshard":
        return math.ceil(rate * tokens) * 2 // num_experts
    return math.ceil(rate * tokens / num_experts)
