"""Tent: minimise the entropy of the predictions on the support images over the affine parameters of the norm layers.

Paper: Wang et al., "Tent: fully test-time adaptation by entropy minimization" (arXiv 2006.10726), equation 1.

Differs: Tent normalises each batch by its own statistics; here BatchNorm statistics are re-estimated once from the
support images (``moe.adaptation.bn``) and then fixed, so that predictions do not depend on the rest of their batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, Reset

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    chunk: int | None = Field(default=None, ge=1, description="Images per pass that measures; null: all at once.")


class Method(Adaptation[Config]):
    """Entropy minimisation; works for multiclass and binary tasks, with any normalisation layers.

    In a stream the moments of Adam are remembered from batch to batch.
    """

    Config = Config
    reset: ClassVar[Reset] = "follow"

    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> AdaptResult:
        """See the base class. Raises SpecError for regression and for models without normalisation layers."""
        import torch

        from moe.adaptation._norm import Opening, descend, opening, predict_in_chunks, recall, remember
        from moe.losses import entropy

        config = self.config
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        fixed, moved = opening(model, support_images, config.statistics)

        first = Opening(model, support_images, {**fixed, **moved}, config.batch_size, config.chunk)

        def loss(images: Tensor, rows: Tensor) -> Tensor:
            logits = model.run(images, {**fixed, **moved}).logits_BK
            first.seen(logits, rows)
            return entropy(self.task, logits)

        optimizer = torch.optim.Adam(moved.values(), lr=config.lr)
        recall(optimizer, moved, memory)
        descend(moved, optimizer, config.steps, loss, support_images, config.batch_size, generator, self._tick)
        delta = {**fixed, **{n: p.detach() for n, p in moved.items()}}
        logits = predict_in_chunks(model, support_images, delta, config.chunk)
        return AdaptResult(
            model,
            delta,
            float(entropy(self.task, first.logits)),
            float(entropy(self.task, logits)),
            steps=config.steps,
            logits_before=None if fixed else first.logits,
            logits_after=logits,
            memory=remember(optimizer, moved),
        )

    def unfit(self, model: Student, has_teacher: bool = False) -> str | None:
        """See the base class."""
        from moe.adaptation._norm import no_entropy

        return no_entropy(model, self.task)
