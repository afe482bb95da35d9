"""DomainBed's two changes to a pretrained network: BatchNorm with frozen statistics, and dropout of the features.

Source: public code of DomainBed, commit b93c22a1 (``freeze_bn``, ``resnet_dropout``), and of GMoE. Small batches by
domain would spoil pretrained statistics; the weights of BatchNorm are learned all the same.
"""

from __future__ import annotations

from typing import Self

from torch import nn

from moe.student import Student


class FrozenStatistics(nn.BatchNorm2d):
    """BatchNorm2d that stays in evaluation mode."""

    def train(self, mode: bool = True) -> Self:
        """The mode does not change."""
        return super().train(False)


def freeze_statistics(module: nn.Module) -> None:
    """Freeze the statistics of every BatchNorm2d inside ``module``, in place; names and weights stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = FrozenStatistics
            child.eval()


def add_dropout(student: Student, rate: float) -> None:
    """Drop features at ``rate`` before the block and the head, in place; 0 changes nothing."""
    if rate:
        student.features = nn.Sequential(*student.features.children(), nn.Dropout(rate))
