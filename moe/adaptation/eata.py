"""EATA: entropy minimisation on those support images only that are reliable and not redundant.

Paper: Niu et al., "Efficient test-time model adaptation without forgetting" (arXiv 2204.02610). An image counts when
its entropy is below ``E0 = 0.4 ln K`` (equation 3) and when the cosine between its prediction and the moving average
of the predictions used so far is below epsilon (equation 5); the rest is weighted by ``exp(E0 - E)`` (equation 4). The
Fisher regulariser (equations 8 and 9) holds parameters back that matter to what the model knew.

Differs: as in ``moe.adaptation.tent``, BatchNorm statistics are estimated once from the support images and then fixed.
Differs: epsilon is published for K = 10 (0.4) and K = 1000 (0.05); without a value of its own it is interpolated
geometrically between the two, since with few classes every prediction is close to the average of all.
Differs: the Fisher information is estimated from the support images and the unadapted model's own labels unless it is
given in ``memory`` (:func:`fisher_information` over images of the training domains is the paper's way).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, Reset

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student

AVERAGE = "average"  # key of the moving average in a method's memory
FISHER = "fisher/"  # prefix of the Fisher information there
ANCHOR = "anchor/"  # prefix of the parameters that the regulariser pulls to


class Config(AdaptationConfig):
    """Options; the defaults are those of the paper for ImageNet (CIFAR-10: ``lr`` 0.005, ``fisher`` 1)."""

    steps: int = Field(default=20, ge=1, le=10000, description="Steps of gradient descent.")
    lr: float = Field(default=2.5e-4, gt=0, le=1, description="Rate of the gradient descent.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Its momentum.")
    batch_size: int = Field(default=64, ge=1, description="Support images per step.")
    statistics: bool = Field(default=True, description="Re-estimate BatchNorm statistics first, where there are any.")
    reliable: float = Field(default=0.4, gt=0, le=1, description="Entropy below which an image counts, times ln K.")
    redundant: float | None = Field(
        default=None, gt=0, le=1, description="Cosine to the average from which an image is redundant; null: by K."
    )
    fresh: float = Field(default=0.1, gt=0, le=1, description="Weight of a new batch in the average.")
    fisher: float = Field(default=0.0, ge=0, description="Weight of the Fisher regulariser (paper: 2000); 0: none.")
    chunk: int | None = Field(default=None, ge=1, description="Images per pass that measures; null: all at once.")


class Method(Adaptation[Config]):
    """Selective entropy minimisation; in a stream, average, momentum and Fisher information are remembered."""

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

        config, known = self.config, dict(memory or {})
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        fixed, moved = opening(model, support_images, config.statistics)
        first = Opening(model, support_images, {**fixed, **moved}, config.batch_size, config.chunk)
        if config.fisher and not all(FISHER + name in known for name in moved):
            known.update(self._fisher(model, support_images, fixed, moved))
        for name, value in moved.items() if config.fisher else ():
            known.setdefault(ANCHOR + name, value.detach().clone())
        selection = Selection(config, self.task, known.get(AVERAGE))

        def loss(images: Tensor, rows: Tensor) -> Tensor | None:
            logits = model.run(images, {**fixed, **moved}).logits_BK
            first.seen(logits, rows)
            value = selection(logits)
            if value is None or not config.fisher:
                return value
            return value + config.fisher * _penalty(moved, known)

        optimizer = torch.optim.SGD(moved.values(), lr=config.lr, momentum=config.momentum)
        recall(optimizer, moved, known)
        descend(moved, optimizer, config.steps, loss, support_images, config.batch_size, generator, self._tick)
        delta = {**fixed, **{n: p.detach() for n, p in moved.items()}}
        logits = predict_in_chunks(model, support_images, delta, config.chunk)
        kept = {name: value for name, value in known.items() if name.startswith((FISHER, ANCHOR))}
        if selection.average_C is not None:
            kept[AVERAGE] = selection.average_C
        return AdaptResult(
            model,
            delta,
            float(entropy(self.task, first.logits)),
            float(entropy(self.task, logits)),
            steps=selection.steps,
            logits_before=None if fixed else first.logits,
            logits_after=logits,
            memory={**remember(optimizer, moved), **kept},
            facts=selection.facts(),
        )

    def _fisher(
        self, model: Student, images: Tensor, fixed: Mapping[str, Tensor], moved: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Fisher information of the support images, as memory."""
        found = fisher_information(model, images, self.task, list(moved), self.config.batch_size, fixed)
        return {f"{FISHER}{name}": value for name, value in found.items()}

    def unfit(self, model: Student, has_teacher: bool = False) -> str | None:
        """See the base class."""
        from moe.adaptation._norm import no_entropy

        return no_entropy(model, self.task)


class Selection:
    """Chooses and weights the rows of each batch, and keeps the moving average of what was chosen.

    Args:
        config: limits.
        task: ``multiclass`` or ``binary``.
        average_C: mean prediction so far, or None at the beginning (nothing is redundant then).
    """

    def __init__(self, config: Config, task: str, average_C: Tensor | None = None) -> None:
        self.config, self.task, self.average_C = config, task, average_C
        self.steps = self.seen = self.reliable = self.chosen = 0

    def __call__(self, logits_BK: Tensor) -> Tensor | None:
        """Loss of the chosen rows, a scalar with a graph; None when no row counts."""
        from torch.nn.functional import cosine_similarity

        from moe.adaptation._norm import entropy_rows, probabilities

        entropy_B = entropy_rows(self.task, logits_BK)
        p_BC = probabilities(self.task, logits_BK).detach()
        classes = p_BC.shape[1]
        limit = self.config.reliable * math.log(classes)
        keep_B = entropy_B.detach() < limit
        self.seen, self.reliable = self.seen + len(keep_B), self.reliable + int(keep_B.sum())
        if self.average_C is not None:
            closest = self.config.redundant or redundancy(classes)
            keep_B = keep_B & (cosine_similarity(p_BC, self.average_C.to(p_BC)[None], dim=1).abs() < closest)
        chosen = int(keep_B.sum())
        if not chosen:
            return None
        self.steps, self.chosen = self.steps + 1, self.chosen + chosen
        mean_C = p_BC[keep_B].mean(dim=0)
        self.average_C = mean_C if self.average_C is None else self.average_C.lerp(mean_C, self.config.fresh)
        weight_B = (limit - entropy_B.detach()).exp()
        return (weight_B * entropy_B)[keep_B].mean()

    def facts(self) -> dict[str, float]:
        """Images looked at over all steps, and how many were reliable and chosen."""
        return {"seen": self.seen, "reliable": self.reliable, "chosen": self.chosen}


def redundancy(classes: int) -> float:
    """Epsilon by number of classes: 0.4 at 10 and 0.05 at 1000 (paper), geometric in between and beyond, at most 1."""
    return min(1.0, 0.4 * math.pow(classes / 10, -math.log(8) / math.log(100)))


def fisher_information(
    model: Student,
    images: Tensor,
    task: str,
    names: list[str],
    batch_size: int = 64,
    adapted: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of ``names``: mean over batches of the squared gradient of the loss on own labels.

    Args:
        model: not changed.
        images: ``[S, C, H, W]``, S >= 1; the paper takes images of the training domains, without labels.
        task: ``multiclass`` or ``binary``.
        names: parameters by student name.
        batch_size: images whose gradients are averaged before squaring.
        adapted: tensors that replace the model's, e.g. statistics of the domain.
    """
    import torch

    from moe.losses import predict, task_loss

    own = dict(model.named_parameters())
    leaves = {name: own[name].detach().clone().requires_grad_() for name in names}
    sums = {name: torch.zeros_like(value) for name, value in leaves.items()}
    pieces = torch.split(images, batch_size)
    for piece in pieces:
        with torch.enable_grad():
            logits_BK = model.run(piece, {**(adapted or {}), **leaves}).logits_BK
            value = task_loss(task, logits_BK, predict(task, logits_BK.detach()))
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.square() / len(pieces)
    return sums


def _penalty(moved: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> Tensor:
    """Sum of Fisher information times squared distance to the anchor; a scalar with a graph."""
    import torch

    parts = [(known[FISHER + name] * (value - known[ANCHOR + name]).square()).sum() for name, value in moved.items()]
    return torch.stack(parts).sum()
