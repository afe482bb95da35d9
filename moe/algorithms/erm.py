"""ERM: empirical risk minimisation, plain supervised training on all source domains together.

Paper: Vapnik, "Statistical learning theory" (1998); the baseline row of Meta-DMoE (arXiv 2210.03885), table 1, and of
DomainBed (arXiv 2007.01434). Equation: mean task loss over the rows. Known differences: on Meta-DMoE's data sets the
presets are its student pre-training, which is the same routine on the same rows, so that ERM and the student start from
equal budgets; on DomainBed's they are its defaults of 2020, and ``NAME@domainbed_head`` those of its public code today
(AugMix weights, BatchNorm not frozen).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moe.algorithms._gmoe_presets import BASELINE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig


class Config(SupervisedConfig):
    """Settings of ERM."""


class Method(Supervised[Config]):
    """A classifier in student form, trained by the task loss (plus the auxiliary losses of its experts)."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = BASELINE_PRESETS
