"""What ERM, GMoE and the DomainBed baselines share: settings, network, parameter groups.

Source: DomainBed (arXiv 2007.01434), public code, commit b93c22a1; its choices are settings here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from moe.algorithms._domains import domains_of, forward, joined, losses
from moe.algorithms.base import Algorithm, Group, Settings, TrainPhase
from moe.specs import BackboneSpec, StudentMoESpec

if TYPE_CHECKING:
    from torch import nn

    from moe.adaptation.base import Adaptation
    from moe.losses import Losses


class DomainPhase(TrainPhase):
    """Training on minibatches by domain."""

    per_domain: bool = Field(default=False, description="batch_size counts the images of each source domain.")
    evaluate_every: int | None = Field(default=None, ge=1, description="Updates between two evaluations.")


class SupervisedConfig(Settings):
    """Settings of every supervised algorithm."""

    backbone: BackboneSpec = Field(description="Network.")
    moe: StudentMoESpec | None = Field(default=None, description="MoE block before the head, or none.")
    train: DomainPhase = Field(description="Training on all rows.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of the features (DomainBed: resnet_dropout).")
    freeze_bn: bool = Field(default=False, description="BatchNorm keeps its statistics; its weights are trained.")
    no_decay: bool = Field(default=False, description="No weight decay for biases, norms, tokens and positions.")


S = TypeVar("S", bound=SupervisedConfig)


class Supervised(Algorithm[S]):
    """A student that is trained by a loss on labelled rows: plain ERM, unless a derived class says otherwise."""

    def build(self, num_outputs: int) -> nn.Module:
        """See the base class."""
        from moe.backbones import build_student
        from moe.models.frozen_bn import add_dropout, freeze_statistics

        student = build_student(self.config.backbone, num_outputs, self.config.moe)
        add_dropout(student, self.config.dropout)
        if self.config.freeze_bn:
            freeze_statistics(student)
        return student

    def architecture(self) -> BackboneSpec:
        """The backbone that rebuilds the trained network, conversions included."""
        return self.config.backbone

    def loss(self, module: nn.Module, batch: Any) -> Losses:
        """Losses of a batch (see ``_domains``); part ``task``, and ``balance``, ``aux`` where there are experts."""
        from moe.losses import task_loss

        rows = joined(domains_of(batch))
        out = forward(module, rows.images)
        return losses(task_loss(self.task, out.logits_BK, rows.labels), {}, [out])

    def param_groups(self, module: nn.Module) -> list[Group]:
        """One group of everything, or with ``no_decay`` the groups ``decay`` and ``no_decay``."""
        from moe.param_groups import NO_DECAY_NAMES, decay_groups

        train = self.config.train
        if self.config.no_decay:
            return decay_groups(module, train.lr, train.weight_decay, (*NO_DECAY_NAMES, "dist_token"))
        return [Group("model", [p for p in module.parameters() if p.requires_grad], train.lr, train.weight_decay)]

    def adaptation(self) -> Adaptation[Any]:
        """These algorithms do not adapt."""
        from moe.adaptation.base import make

        return make("none", task=self.task)
