"""The toy backbones of Meta-DMoE's golden vectors: networks small enough to store, with torchvision's child names.

They stand in for ResNet and DenseNet; all around them (student form, aggregator, losses, steps) is the project's own.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe.student import Layout, Student, student_view


class ToyRes(nn.Module):
    """``toy_res``: the residual family's children in torchvision's order; ``layer1`` is given."""

    def __init__(self, stem: int, dim: int, num_outputs: int, layer1: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = layer1
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class ResidualBlock(nn.Module):
    """One block with a strided convolutional shortcut."""

    def __init__(self, stem: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(stem, dim, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.downsample = nn.Sequential(nn.Conv2d(stem, dim, 1, stride=2, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + self.downsample(x))


class ToyDense(nn.Module):
    """``toy_dense``: the dense family, with the ReLU that only the raw classifier applies after the last BatchNorm."""

    def __init__(self, stem: int, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(stem))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("pool0", nn.AvgPool2d(2, stride=2))
        self.features.add_module("conv1", nn.Conv2d(stem, dim, 3, padding=1, bias=False))
        self.features.add_module("norm5", nn.BatchNorm2d(dim))
        self.classifier = nn.Linear(dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).relu().mean(dim=(2, 3)))


def toy_classifier(name: str, stem: int, dim: int, num_outputs: int) -> nn.Module:
    """A raw classifier with torchvision-like keys.

    Args:
        name: ``toy_res``, ``toy_res_block`` or ``toy_dense``.
        stem: channels of the first convolution.
        dim: feature width D.
        num_outputs: K.
    """
    if name == "toy_dense":
        return ToyDense(stem, dim, num_outputs)
    if name == "toy_res_block":
        return ToyRes(stem, dim, num_outputs, nn.Sequential(ResidualBlock(stem, dim)))
    if name == "toy_res":
        conv = nn.Conv2d(stem, dim, 3, stride=2, padding=1, bias=False)
        return ToyRes(stem, dim, num_outputs, nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU()))
    raise ValueError(f"There is no toy backbone named {name!r}.")


def toy_student(name: str, stem: int, dim: int, num_outputs: int) -> Student:
    """The project's student view of a toy backbone; arguments as :func:`toy_classifier`."""
    layout = Layout("features", "classifier") if name == "toy_dense" else Layout("children", "fc")
    return student_view(toy_classifier(name, stem, dim, num_outputs), layout)


def stem_width(state: dict[str, Tensor]) -> int:
    """Channels of the first convolution, from a raw classifier's or a student's tensors."""
    first = ("conv1.weight", "features.conv0.weight", "features.0.weight", "features.0.conv0.weight")
    return next(state[name].shape[0] for name in first if name in state)
