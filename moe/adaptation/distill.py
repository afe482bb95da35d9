"""Meta-DMoE's own adaptation: one gradient step that pulls the student's features to the aggregator's teacher signal.

Paper: Meta-DMoE (arXiv 2210.03885), section 3.3 and algorithm 2: tokens of ALL experts, no exclusion, one plain
gradient step of rate alpha on the features; the head stays.

Differs: the public code builds a second-order graph here that nobody uses; this is first order with the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, require_support
from moe.errors import SpecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student


class Config(AdaptationConfig):
    """Options; use the values of meta-training."""

    inner_lr: float = Field(default=1e-3, gt=0, le=10, description="Rate alpha of the gradient step.")
    steps: int = Field(default=1, ge=1, le=1000, description="Gradient steps on the same support batch.")
    adapt: Literal["all", "norm"] = Field(default="all", description="Feature parameters that move.")
    rates: dict[str, float] = Field(
        default_factory=dict,
        description="Learned rates by student tensor name; replaces inner_lr and adapt when given.",
    )
    measure_after: bool = Field(default=False, description="Compute the distance to the teacher after the last step.")


class Method(Adaptation[Config]):
    """Distillation towards the aggregator's features."""

    Config = Config
    needs_teacher = True

    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
    ) -> AdaptResult:
        """See the base class. The adapted tensors do not depend on ``generator``."""
        import torch

        from moe.inner import inner_step, uniform_rates
        from moe.losses import l2_loss

        require_support(support_images)
        if tokens is None or aggregator is None:
            raise SpecError("distill needs the experts' features and the aggregator.", "Wire them, or use bn or tent.")
        if tokens.shape[0] != support_images.shape[0]:
            raise SpecError(
                f"There are {support_images.shape[0]} support images, but {tokens.shape[0]} rows of tokens."
            )
        config = self.config
        rates = dict(config.rates) or uniform_rates(model, config.inner_lr, config.adapt)
        unknown = [name for name in rates if name not in dict(model.named_parameters())]
        if unknown:
            raise SpecError(
                f"Inner rates name {unknown[0]!r}, which this student does not have.",
                "Use the rates that were learned with this student.",
            )
        with torch.no_grad():
            target = aggregator(tokens).feat_BD
        inner = inner_step(model, support_images, target, rates, config.steps)
        after = None
        if config.measure_after:
            with torch.no_grad():
                after = float(l2_loss(model.extract(support_images, inner.adapted), target))
        return AdaptResult(model, inner.adapted, float(inner.losses[0]), after)
