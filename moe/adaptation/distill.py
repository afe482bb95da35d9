"""Meta-DMoE's own adaptation: one gradient step that pulls the student's features to the aggregator's teacher signal.

Paper: Meta-DMoE (arXiv 2210.03885), section 3.3 and algorithm 2: tokens of ALL experts, no exclusion, one plain
gradient step of rate alpha on the features; the head stays. Its reset policy is ``each``: the base model is the
starting point that was learned for this step, so every adaptation begins there.

Differs: the public code builds a second-order graph here that nobody uses; this is first order with the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, require_support
from moe.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    chunk: int | None = Field(
        default=None, ge=1, description="Images per pass; the gradient stays that of all. null: one pass."
    )


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
        memory: Mapping[str, Tensor] | None = None,
    ) -> AdaptResult:
        """See the base class. The adapted tensors do not depend on ``generator``."""
        import torch

        from moe.inner import uniform_rates
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
            teacher = aggregator(tokens, need_attention=True)
        delta, before, features_SD = self._steps(model, support_images, teacher.feat_BD, rates)
        after, start, end = None, None, None
        if config.measure_after:
            with torch.no_grad():
                pieces = torch.split(support_images, config.chunk or support_images.shape[0])
                moved_SD = torch.cat([model.extract(piece, delta) for piece in pieces])
                after = float(l2_loss(moved_SD, teacher.feat_BD))
                start, end = model.classifier(features_SD), model.classifier(moved_SD)
        return AdaptResult(
            model,
            delta,
            before,
            after,
            steps=config.steps,
            expert_weights=expert_weights(teacher.attention_LBHEE, tokens.shape[1]),
            logits_before=start,
            logits_after=end,
        )

    def _steps(
        self, model: Student, images: Tensor, target_SD: Tensor, rates: Mapping[str, Tensor | float]
    ) -> tuple[dict[str, Tensor], float, Tensor]:
        """Adapted tensors, loss before the first step, features ``[S, D]`` before it."""
        import torch

        from moe.inner import inner_step

        config = self.config
        if config.chunk is None or images.shape[0] <= config.chunk:
            inner = inner_step(model, images, target_SD, rates, config.steps)
            self._tick(config.steps, config.steps)
            return inner.adapted, float(inner.losses[0]), inner.features_SD
        own = dict(model.named_parameters())
        current = {name: own[name].detach() for name in rates}
        losses: list[float] = []
        features: list[Tensor] = []
        for step in range(config.steps):
            sums = {name: torch.zeros_like(value) for name, value in current.items()}
            losses.append(0.0)
            pieces = zip(torch.split(images, config.chunk), torch.split(target_SD, config.chunk), strict=True)
            for piece, wanted in pieces:
                inner = inner_step(model, piece, wanted, rates, 1, parameters=current)
                share = piece.shape[0] / images.shape[0]
                losses[-1] += share * float(inner.losses[0])
                for name, gradient in inner.gradients.items():
                    sums[name] += share * gradient
                if step == 0:
                    features.append(inner.features_SD)
            current = {name: value - rates[name] * sums[name] for name, value in current.items()}
            self._tick(step + 1, config.steps)
        return current, losses[0], torch.cat(features)

    def unfit(self, model: Student, has_teacher: bool = False) -> str | None:
        """See the base class."""
        return None if has_teacher else "the model came without the experts and the aggregator that teach it"


def expert_weights(attention_LBHEE: Tensor | None, experts: int) -> tuple[float, ...]:
    """Share of the attention that each expert receives: mean over layers, images, heads and attending tokens.

    Args:
        attention_LBHEE: the aggregator's maps; None for one without layers, which hears all experts alike.
        experts: E.
    """
    if attention_LBHEE is None:
        return (1.0 / experts,) * experts
    return tuple(float(value) for value in attention_LBHEE.double().mean(dim=(0, 1, 2, 3)))
