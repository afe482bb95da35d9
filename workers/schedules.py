"""Learning-rate schedules: functions from the update number (from 0) to a multiplier of the base rate.

Source: Meta-DMoE (arXiv 2210.03885), public code: a constant factor per epoch for iWildCam, Camelyon17 and FMoW, and
the cosine with linear warm-up of the ``transformers`` package for RxRx1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moe.errors import SpecError


def constant() -> Callable[[int], float]:
    """The base rate throughout."""
    return lambda step: 1.0


def exponential_per_epoch(decay: float, steps_per_epoch: int) -> Callable[[int], float]:
    """``decay ** epoch``, epochs from 0, constant within an epoch.

    Args:
        decay: factor per epoch, > 0.
        steps_per_epoch: updates per epoch, >= 1.

    Raises:
        SpecError: outside these ranges.
    """
    if decay <= 0 or steps_per_epoch < 1:
        raise SpecError(
            f"decay is {decay} and steps_per_epoch is {steps_per_epoch}.", "Use a decay above 0 and at least one step."
        )
    return lambda step: decay ** (step // steps_per_epoch)


def cosine_warmup(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Linear from 0 over ``warmup_steps``, then half a cosine down to 0 at ``total_steps``.

    Parity: update 0 of a warm-up uses rate 0.

    Args:
        warmup_steps: W >= 0.
        total_steps: T >= 1; may lie inside the warm-up, which is then cut off.

    Raises:
        SpecError: outside these ranges.
    """
    if warmup_steps < 0 or total_steps < 1:
        raise SpecError(
            f"warmup_steps is {warmup_steps} and total_steps is {total_steps}.",
            "Use a warm-up of 0 or more steps and at least one step in total.",
        )

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return multiplier


def one_cycle(total_steps: int, warmup: float = 0.1, start: float = 0.04, end: float = 4e-6) -> Callable[[int], float]:
    """Half-cosine from ``start`` up to 1 over the first ``warmup`` share of the steps, then down to ``end``.

    The shape (and the defaults) of ``torch.optim.lr_scheduler.OneCycleLR`` with ``pct_start=0.1`` as multipliers of the
    highest rate. Source: Smith & Topin, Super-Convergence, arXiv 1708.07120.

    Args:
        total_steps: T >= 1.
        warmup: share of rising steps, 0 to 1.
        start: multiplier of update 0.
        end: multiplier of the last update.

    Raises:
        SpecError: outside these ranges.
    """
    if total_steps < 1 or not 0 <= warmup <= 1:
        raise SpecError(
            f"total_steps is {total_steps} and warmup is {warmup}.", "Use at least one step and a share from 0 to 1."
        )
    peak = warmup * total_steps - 1

    def multiplier(step: int) -> float:
        if step < peak:
            return _half_cosine(start, 1.0, step / peak)
        last = total_steps - 1
        return _half_cosine(1.0, end, min(1.0, (step - peak) / (last - peak))) if last > peak else 1.0

    return multiplier


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
