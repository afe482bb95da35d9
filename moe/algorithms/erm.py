"""ERM: empirical risk minimisation, plain supervised training on all source domains together.

Paper: Vapnik, "Statistical learning theory" (1998); the baseline row of Meta-DMoE (arXiv 2210.03885), table 1.
Equation: mean task loss over the rows. Known differences: presets are Meta-DMoE's student pre-training, which is the
same routine on the same rows, so that ERM and the student start from equal budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moe.algorithms.base import Algorithm, Group, Settings, TrainPhase
from moe.algorithms.meta_dmoe import PRESETS as META_PRESETS
from moe.specs import BackboneSpec, StudentMoESpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.adaptation.base import Adaptation
    from moe.losses import Losses


class Config(Settings):
    """Settings of ERM."""

    backbone: BackboneSpec = Field(description="Network.")
    moe: StudentMoESpec | None = Field(default=None, description="MoE block before the head, or none.")
    train: TrainPhase = Field(description="Training on all rows.")


class Method(Algorithm[Config]):
    """A classifier in student form, trained by the task loss (plus the balance loss of an MoE block)."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Source: as Meta-DMoE's student pre-training, see there.
        name: {"backbone": fields["backbone"], "train": fields["student"]}
        for name, fields in META_PRESETS.items()
    }

    def build(self, num_outputs: int) -> nn.Module:
        """See the base class."""
        from moe.backbones import build_student

        return build_student(self.config.backbone, num_outputs, self.config.moe)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
        """Losses of ``(images [B, C, H, W], labels [B])``; parts ``task`` and, with an MoE block, ``balance``."""
        from moe.backbones import Student
        from moe.losses import Losses, task_loss
        from moe.meta_step import balance_weight

        images, labels = batch
        if not isinstance(module, Student) or module.moe is None:
            value = task_loss(self.task, module(images), labels)
            return Losses(value, {"task": value.detach()})
        out = module.run(images)
        value = task_loss(self.task, out.logits_BK, labels)
        if out.balance is None:
            return Losses(value, {"task": value.detach()})
        total = value + balance_weight(module) * out.balance
        return Losses(total, {"task": value.detach(), "balance": out.balance.detach()})

    def param_groups(self, module: nn.Module) -> list[Group]:
        """One group of everything."""
        train = self.config.train
        return [Group("model", [p for p in module.parameters() if p.requires_grad], train.lr, train.weight_decay)]

    def adaptation(self) -> Adaptation[Any]:
        """ERM does not adapt."""
        from moe.adaptation.base import make

        return make("none", task=self.task)
