"""Tent: minimise the entropy of the predictions on the support images over the affine parameters of the norm layers.

Paper: Wang et al., "Tent: fully test-time adaptation by entropy minimization" (arXiv 2006.10726), equation 1.

Differs: Tent normalises each batch by its own statistics; here BatchNorm statistics are re-estimated once from the
support images (``moe.adaptation.bn``) and then fixed, so that predictions do not depend on the rest of their batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, require_support

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student


class Config(AdaptationConfig):
    """Options."""

    steps: int = Field(default=20, ge=1, le=10000, description="Adam steps.")
    lr: float = Field(default=1e-3, gt=0, le=1, description="Rate of Adam.")
    batch_size: int = Field(default=64, ge=1, description="Support images per step.")
    statistics: bool = Field(default=True, description="Re-estimate BatchNorm statistics first, where there are any.")


class Method(Adaptation[Config]):
    """Entropy minimisation; works for multiclass and binary tasks, with any normalisation layers."""

    Config = Config

    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
    ) -> AdaptResult:
        """See the base class. Raises SpecError for regression and for models without normalisation layers."""
        import torch

        from moe.adaptation.bn import estimate
        from moe.inner import adapted_parameters
        from moe.losses import entropy

        require_support(support_images)
        config, count = self.config, support_images.shape[0]
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        fixed = estimate(model, support_images) if config.statistics else {}
        moved = {n: p.detach().clone().requires_grad_() for n, p in adapted_parameters(model, "norm").items()}

        def loss(images: Tensor) -> Tensor:
            return entropy(self.task, model.run(images, {**fixed, **moved}).logits_BK)

        with torch.no_grad():
            before = float(loss(support_images))
        optimizer = torch.optim.Adam(moved.values(), lr=config.lr)
        for _ in range(config.steps):
            rows = torch.randperm(count, generator=generator, device=generator.device)[: config.batch_size]
            with torch.enable_grad():
                value = loss(support_images[rows.to(support_images.device)])
            gradients = torch.autograd.grad(value, list(moved.values()), allow_unused=True)
            for parameter, gradient in zip(moved.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        with torch.no_grad():
            after = float(loss(support_images))
        return AdaptResult(model, {**fixed, **{n: p.detach() for n, p in moved.items()}}, before, after)
