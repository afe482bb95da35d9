"""Fish: gradient matching between domains by first-order meta-learning.

Paper: Shi et al., ICLR 2022 (arXiv 2104.09937), algorithm 1. Public code: DomainBed, commit b93c22a1. One update walks
through the domains with one optimiser step each, from the weights theta to theta~, and then moves
``theta <- theta + meta_lr * (theta~ - theta)``. The inner optimiser's moments persist from update to update.

Known differences: buffers (BatchNorm statistics) are mixed like weights if they are floats and kept as they arrived if
they are counters. GMoE with Fish, a row of the GMoE paper without public code, is this file on a sparse backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moe.algorithms._domains import domains_of
from moe.algorithms._gmoe_presets import BASELINE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig
from moe.algorithms.base import R

if TYPE_CHECKING:
    from torch import nn


class Config(SupervisedConfig):
    """Settings of Fish."""

    meta_lr: float = Field(default=0.5, gt=0, le=1, description="Share of the inner loop's way that is kept.")


class Method(Supervised[Config]):
    """ERM's loss per domain inside Fish's update; it needs batches by domain."""

    Config = Config
    # Source: DomainBed's defaults.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = BASELINE_PRESETS

    def update(self, module: nn.Module, batch: Any, take_step: Callable[[Any], R]) -> R:
        """One engine step per domain, then the move; returns what the last step returned."""
        import torch

        start = {name: value.detach().clone() for name, value in module.state_dict().items()}
        result = [take_step([rows]) for rows in domains_of(batch)][-1]
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.lerp(start[name], value, self.config.meta_lr))
        return result
