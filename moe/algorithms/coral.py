"""CORAL: align means and covariances of the features of every two source domains.

Paper: Sun and Saenko, "Deep CORAL" (arXiv 1607.01719). Public code: DomainBed, commit b93c22a1. Equation: mean task
loss over domains plus gamma times the mean, over pairs of domains, of the mean squared difference of the feature means
and of the feature covariances (unbiased).

Known differences: as in the public code every domain is a pass of its own, so that batch statistics and routing see one
domain; ``joint`` makes it one pass over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moe.algorithms._domains import Pass, domains_of, forward, joined, losses
from moe.algorithms._gmoe_presets import BASELINE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig
from moe.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.algorithms._domains import Rows
    from moe.losses import Losses


class Config(SupervisedConfig):
    """Settings of CORAL."""

    gamma: float = Field(default=1.0, ge=0, description="Weight of the distance (mmd_gamma).")
    joint: bool = Field(default=False, description="One pass over all domains instead of one per domain.")


class Method(Supervised[Config]):
    """ERM with aligned features; it needs batches by domain."""

    Config = Config
    # Source: DomainBed's defaults.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = BASELINE_PRESETS

    def loss(self, module: nn.Module, batch: Any) -> Losses:
        """Losses of a batch by domain; parts ``task`` and ``distance`` (weighted)."""
        import torch

        from moe.losses import task_loss

        rows = domains_of(batch)
        passes = self._passes(module, rows)
        given = [out.features_BD for out in passes if out.features_BD is not None]
        if not given:
            raise SpecError(
                f"CORAL needs features; a {type(module).__name__} gives none.", "Build it with Method.build."
            )
        features = torch.split(torch.cat(given), [len(r.labels) for r in rows])
        logits = torch.split(torch.cat([out.logits_BK for out in passes]), [len(r.labels) for r in rows])
        task = torch.stack([task_loss(self.task, x, r.labels) for x, r in zip(logits, rows, strict=True)]).mean()
        pairs = [coral_distance(a, b) for a, b in combinations(features, 2)]
        distance = torch.stack(pairs).mean() if pairs else task.new_zeros(())
        return losses(task, {"distance": self.config.gamma * distance}, passes)

    def _passes(self, module: nn.Module, rows: list[Rows]) -> list[Pass]:
        if self.config.joint:
            return [forward(module, joined(rows).images)]
        return [forward(module, r.images) for r in rows]


def coral_distance(x_AD: Tensor, y_BD: Tensor) -> Tensor:
    """Mean squared difference of means plus mean squared difference of covariances of two sets of features.

    Raises:
        SpecError: a set of fewer than two rows, which has no covariance.
    """
    if min(len(x_AD), len(y_BD)) < 2:
        raise SpecError(f"CORAL compares {len(x_AD)} and {len(y_BD)} rows.", "Draw at least 2 of each domain.")
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x_AD), _moments(y_BD)
    return (mean_x - mean_y).square().mean() + (cov_x - cov_y).square().mean()


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    mean_1D = x_ND.mean(dim=0, keepdim=True)
    centred_ND = x_ND - mean_1D
    return mean_1D, centred_ND.t() @ centred_ND / (len(x_ND) - 1)
