"""SMA: ERM whose predictions come from a simple moving average of the weights.

Paper: Arpit et al., "Ensemble of averages" (arXiv 2110.10832), section 3.1. Public code: GMoE's ERM_SMA, commit
0689d557. Until update ``start`` (counted from 1) the average is a copy; from then on it is the running mean of that
copy and all later weights. It is the same for any loss; here it is ERM's.

Known differences: float buffers are averaged like weights (the public code keeps the first ones, which its frozen
BatchNorm never changes); counters are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moe.algorithms._gmoe_presets import BASELINE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig
from moe.algorithms.base import WeightAverage
from moe.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor


class Config(SupervisedConfig):
    """Settings of SMA."""

    start: int = Field(default=100, ge=1, description="Update from which weights are averaged, counted from 1.")


class Method(Supervised[Config]):
    """ERM, evaluated at the average of its weights."""

    Config = Config
    # Source: DomainBed's defaults; start: public code.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = BASELINE_PRESETS

    def averaging(self) -> MovingAverage:
        """See the base class."""
        return MovingAverage(self.config.start)


class MovingAverage(WeightAverage):
    """Running mean of the weights from update ``start`` on.

    Args:
        start: update from which weights are averaged, counted from 1; the weights before it count as one.
    """

    def __init__(self, start: int = 100) -> None:
        self.start = start
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """See the base class."""
        averaging = step + 1 >= self.start and bool(self.mean)
        self.count = self.count + 1 if averaging else 0
        blend(self.mean, weights, 1.0 / (self.count + 1))

    def average(self) -> dict[str, Tensor]:
        """See the base class."""
        if not self.mean:
            raise SpecError("There is nothing to average before the first update.")
        return dict(self.mean)

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"count": self.count, "mean": dict(self.mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the base class."""
        self.count, self.mean = int(state["count"]), {name: x.clone() for name, x in state["mean"].items()}


def blend(mean: dict[str, Tensor], weights: Mapping[str, Tensor], share: float) -> None:
    """Move ``mean`` towards ``weights`` by ``share``, in place; what is no float, or has share 1, is copied."""
    import torch

    with torch.no_grad():
        for name, value in weights.items():
            if name not in mean or share == 1.0 or not value.is_floating_point():
                mean[name] = value.detach().clone()
            else:
                mean[name].lerp_(value.detach().to(mean[name].dtype), share)
