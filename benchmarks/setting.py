"""The common setting: five experts, a student and an aggregator, and images; built from the project's own functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.aggregator import Aggregator
from moe.backbones import Student, build_student
from moe.meta_step import Episode
from moe.specs import BackboneSpec

EXPERTS, CLASSES, SUPPORT, QUERY = 5, 62, 24, 16


@dataclass(frozen=True)
class Sizes:
    """How large: the real sizes, or small ones that only show that the benchmark runs (``--quick``)."""

    backbone: str = "torchvision:resnet50"
    pixels: int = 96
    repetitions: int = 3

    @staticmethod
    def quick() -> Sizes:
        """Seconds instead of minutes; the ratios mean nothing."""
        return Sizes(backbone="tiny_cnn", pixels=32, repetitions=2)


@dataclass(frozen=True)
class Setting:
    """Frozen experts, student, aggregator."""

    experts: list[Student]
    student: Student
    aggregator: Aggregator
    pixels: int

    def images(self, count: int, seed: int) -> Tensor:
        """Random images ``[count, 3, pixels, pixels]``."""
        return torch.randn(count, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(seed))

    def tokens(self, images: Tensor) -> Tensor:
        """Features of all experts, one after the other, ``[B, E, D]``."""
        with torch.no_grad():
            return torch.stack([expert.extract(images) for expert in self.experts], dim=1)

    def episode(self, seed: int) -> Episode:
        """Support, query, labels and the experts' tokens."""
        images = self.images(SUPPORT + QUERY, seed)
        labels = torch.randint(0, CLASSES, (QUERY,), generator=torch.Generator().manual_seed(seed))
        owners = torch.full((SUPPORT,), seed % EXPERTS)
        return Episode(images[:SUPPORT], images[SUPPORT:], labels, self.tokens(images[:SUPPORT]), owners)


def make(sizes: Sizes) -> Setting:
    """The models, randomly initialised and in evaluation mode."""
    torch.manual_seed(0)
    spec = BackboneSpec(name=sizes.backbone)
    models = [build_student(spec, CLASSES).eval() for _ in range(EXPERTS + 1)]
    for model in models[:EXPERTS]:
        model.requires_grad_(False)
    for model in models:
        _calm(model)
    student = models[EXPERTS]
    return Setting(models[:EXPERTS], student, Aggregator(student.feature_dim, CLASSES).eval(), sizes.pixels)


def _calm(model: Student) -> None:
    """Shrink the residual branches, as training does.

    At random weights a deep residual network blows its features up so much that the second-order gradient is dominated
    by rounding: two float32 evaluations of the same formula then differ by half, and an error measured against one of
    them says nothing. The time of a step does not depend on the weights.
    """
    with torch.no_grad():
        for block in model.modules():
            last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
            if isinstance(last, nn.BatchNorm2d):
                last.weight.fill_(0.2)
