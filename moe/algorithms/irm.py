"""IRM: invariant risk minimisation, form v1.

Paper: Arjovsky et al. (arXiv 1907.02893), equation IRMv1. Public code: DomainBed, commit b93c22a1. Equation: mean task
loss over domains plus lambda times the mean of the squared gradient of each domain's loss with respect to a scale of 1
on the logits, estimated without bias as the product of the gradients of two halves (rows of even and of odd number).
Before ``penalty_anneal_iters`` lambda is 1; at that update the optimiser starts anew, as there.

Known differences: none in the numbers; any task loss is allowed. The penalty is second order in the scale only, so that
every backbone works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moe.algorithms._domains import domains_of, forward, joined, losses
from moe.algorithms._gmoe_presets import BASELINE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig
from moe.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.losses import Losses


class Config(SupervisedConfig):
    """Settings of IRM."""

    penalty: float = Field(default=100.0, ge=0, description="Weight lambda of the penalty (irm_lambda).")
    penalty_anneal_iters: int = Field(default=500, ge=0, description="Updates in which the weight is 1 instead.")


class Method(Supervised[Config]):
    """ERM with the invariance penalty; it needs batches by domain."""

    Config = Config
    # Source: DomainBed's defaults.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = BASELINE_PRESETS

    def loss(self, module: nn.Module, batch: Any) -> Losses:
        """Losses with the full penalty; parts ``task`` and ``penalty`` (weighted)."""
        return self.loss_at(module, batch, self.config.penalty_anneal_iters)

    def loss_at(self, module: nn.Module, batch: Any, step: int) -> Losses:
        """See the base class."""
        import torch

        from moe.losses import task_loss

        rows = domains_of(batch)
        out = forward(module, joined(rows).images)
        logits = torch.split(out.logits_BK, [len(r.labels) for r in rows])
        task = torch.stack([task_loss(self.task, x, r.labels) for x, r in zip(logits, rows, strict=True)]).mean()
        penalties = [irm_penalty(self.task, x, r.labels) for x, r in zip(logits, rows, strict=True)]
        weight = self.config.penalty if step >= self.config.penalty_anneal_iters else 1.0
        return losses(task, {"penalty": weight * torch.stack(penalties).mean()}, [out])

    def restarts_optimizer(self, step: int) -> bool:
        """Parity: Adam would not bear the jump of the gradients at the end of the annealing."""
        return step == self.config.penalty_anneal_iters


def irm_penalty(task: str, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Unbiased estimate of the squared gradient of the loss with respect to a scale on the logits; may be negative.

    Raises:
        SpecError: fewer than two rows, which have no two halves.
    """
    import torch

    from moe.losses import task_loss

    if len(labels_B) < 2:
        raise SpecError(f"IRM halves the rows of each domain, but one has {len(labels_B)}.", "Draw at least 2 of each.")
    with torch.enable_grad():
        scale = torch.ones((), dtype=logits_BK.dtype, device=logits_BK.device, requires_grad=True)
        halves = [task_loss(task, logits_BK[i::2] * scale, labels_B[i::2]) for i in (0, 1)]
        even, odd = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
    return even * odd
