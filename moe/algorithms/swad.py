"""SWAD: ERM whose weights are averaged densely over the flat part of the validation loss.

Paper: Cha et al., NeurIPS 2021 (arXiv 2102.08604), algorithm 1 and section 3. Every update's weights count. The average
begins with the segment (the updates between two evaluations) whose validation loss is the smallest of ``converge``
successive ones, and ends before the losses of ``tolerance`` successive segments all exceed ``ratio`` times the mean
loss of those first ``converge`` segments.

Known differences: segments count by their number of updates (equal segments in the public code). If the loss never
settles, the mean of the last segment is kept, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from pydantic import Field

from moe.algorithms._gmoe_presets import BASELINE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig
from moe.algorithms.base import WeightAverage
from moe.algorithms.sma import blend
from moe.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor


class Config(SupervisedConfig):
    """Settings of SWAD."""

    converge: int = Field(default=3, ge=1, description="Optimum patience N_s, in evaluations.")
    tolerance: int = Field(default=6, ge=1, description="Overfit patience N_e, in evaluations.")
    ratio: float = Field(default=1.3, ge=1, description="Tolerance r of the loss; the paper takes 1.2 for VLCS.")


class Method(Supervised[Config]):
    """ERM, evaluated at the average over the valley of its validation loss."""

    Config = Config
    # Source: paper, appendix B.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {**fields, "ratio": 1.2} if name.startswith("vlcs") else fields
        for name, fields in BASELINE_PRESETS.items()
    }

    def averaging(self) -> LossValley:
        """See the base class."""
        return LossValley(self.config.converge, self.config.tolerance, self.config.ratio)


class Segment(TypedDict):
    """Mean weights between two evaluations, the number of updates in it, and the loss at its end."""

    mean: dict[str, Tensor]
    count: int
    loss: float


class LossValley(WeightAverage):
    """Dense average over the valley; see the module.

    Args:
        converge: N_s.
        tolerance: N_e.
        ratio: r, at least 1.
    """

    observes: ClassVar[bool] = True

    def __init__(self, converge: int = 3, tolerance: int = 6, ratio: float = 1.3) -> None:
        self.converge, self.tolerance, self.ratio = converge, tolerance, ratio
        self.current: Segment = {"mean": {}, "count": 0, "loss": float("nan")}
        self.waiting: list[Segment] = []
        """Segments that are not decided on: the latest N_s before convergence, at most N_e after."""
        self.mean: dict[str, Tensor] = {}
        self.count = 0
        self.threshold: float | None = None
        self.finished = False

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """See the base class."""
        if self.finished:
            return
        self.current["count"] += 1
        blend(self.current["mean"], weights, 1.0 / self.current["count"])

    def observe(self, loss: float) -> bool:
        """See the base class; an evaluation without an update since the last one changes nothing."""
        if self.finished or not self.current["count"]:
            return self.finished
        self.waiting.append({**self.current, "loss": loss})
        self.current = {"mean": {}, "count": 0, "loss": float("nan")}
        if self.threshold is None:
            self._look_for_start()
        else:
            self._decide()
        return self.finished

    def average(self) -> dict[str, Tensor]:
        """The average as if training ended now.

        Raises:
            SpecError: before the first update.
        """
        if self.threshold is None:
            last = self.waiting[-1] if self.waiting else self.current
            if not last["count"]:
                raise SpecError("There is nothing to average before the first update.")
            return dict(last["mean"])
        mean = {name: value.clone() for name, value in self.mean.items()}
        count = self.count
        for i, segment in enumerate([] if self.finished else self.waiting):
            if min(later["loss"] for later in self.waiting[i:]) > self.threshold:
                break
            count += segment["count"]
            blend(mean, segment["mean"], segment["count"] / count)
        return mean

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the base class."""
        for name in _STATE:
            setattr(self, name, state[name])

    def _look_for_start(self) -> None:
        self.waiting = self.waiting[-self.converge :]
        values = [segment["loss"] for segment in self.waiting]
        if len(values) < self.converge or min(values) != values[0]:
            return
        # Rounding must not put the mean of equal losses below them.
        self.threshold = max(self.ratio * sum(values) / len(values), values[0])
        # Parity: with a shorter patience the first segments are taken unseen.
        while len(self.waiting) >= self.tolerance:
            self._take(self.waiting.pop(0))

    def _decide(self) -> None:
        assert self.threshold is not None
        if len(self.waiting) < self.tolerance:
            return
        if min(segment["loss"] for segment in self.waiting) > self.threshold:
            self.finished, self.waiting = True, []
        else:
            self._take(self.waiting.pop(0))

    def _take(self, segment: Segment) -> None:
        self.count += segment["count"]
        blend(self.mean, segment["mean"], segment["count"] / self.count)


_STATE = ("current", "waiting", "mean", "count", "threshold", "finished")
