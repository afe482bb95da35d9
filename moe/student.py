"""The student: the same network as an expert, seen as ``features`` and ``classifier``, with an optional MoE block.

A torchvision-like classifier has three views (Meta-DMoE, public code): the raw classifier, in which an expert is
trained; the extractor, which gives the frozen expert's features; and the student. :func:`student_view` derives the last
two from the first and :func:`student_key` renames its tensors.

Parity: in the DenseNet family torchvision applies a ReLU after the last BatchNorm inside its own ``forward``. The views
take the child ``features`` alone, so their features can be negative. Public checkpoints were trained so.

Shapes: B batch, D feature width, K outputs, E experts of the MoE block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from moe.errors import SpecError
from moe.layers.block import MoEOutput

FEATURES = "features."


@dataclass(frozen=True)
class Layout:
    """How a classifier falls apart into features and head.

    Attributes:
        kind: ``children``: all children but the head, renumbered (ResNet family). ``features``: the child of that name
            and a global average pool (DenseNet family). ``whole``: the model itself with its head taken out (timm).
        head: dotted name of the linear head.
        last_relu: a ReLU between the child ``features`` and the pool.
    """

    kind: Literal["children", "features", "whole"]
    head: str
    last_relu: bool = False


class StudentOutput(NamedTuple):
    """Everything one pass of a student gives.

    Attributes:
        features_BD: pooled features, after the MoE block if there is one.
        logits_BK: class scores.
        balance: the block's balance loss, or None without a block.
        counts_E: images by expert of the block, or None.
    """

    features_BD: Tensor
    logits_BK: Tensor
    balance: Tensor | None
    counts_E: Tensor | None


class Student(nn.Module):
    """features, then an optional MoE block, then the classifier.

    Test-time adaptation moves ``features`` only; block and classifier are learned in meta-training and stay.

    Args:
        features: images to ``[B, D]`` or ``[B, D, 1, 1]``.
        head: linear layer from D to K.
        moe: block on the pooled features, or None.
    """

    def __init__(self, features: nn.Module, head: nn.Linear, moe: nn.Module | None = None) -> None:
        super().__init__()
        self.features = features
        self.moe = moe
        self.classifier = nn.Sequential(head)
        self.feature_dim = head.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        return self.run(x).logits_BK

    def extract(self, x: Tensor, adapted: Mapping[str, Tensor] | None = None) -> Tensor:
        """Pooled features ``[B, D]``, after the MoE block if there is one.

        Args:
            x: images ``[B, C, H, W]``.
            adapted: tensors that replace parameters of ``features`` in this pass, by their names in the student.
        """
        return self.refine(self.pooled(x, adapted))[0]

    def run(self, x: Tensor, adapted: Mapping[str, Tensor] | None = None) -> StudentOutput:
        """One pass with everything that it gives; arguments as :meth:`extract`."""
        features_BD, block = self.refine(self.pooled(x, adapted))
        logits_BK = self.classifier(features_BD)
        if block is None:
            return StudentOutput(features_BD, logits_BK, None, None)
        return StudentOutput(features_BD, logits_BK, block.balance, block.counts_E)

    def pooled(self, x: Tensor, adapted: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features ``[B, D]`` before the MoE block; arguments as :meth:`extract`."""
        if not adapted:
            out: Tensor = self.features(x)
        else:
            own = {name.removeprefix(FEATURES): value for name, value in adapted.items()}
            out = functional_call(self.features, own, (x,))
        return out.flatten(1)

    def refine(self, pooled_BD: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """Apply the MoE block, if there is one, to pooled features."""
        if self.moe is None:
            return pooled_BD, None
        block: MoEOutput = self.moe(pooled_BD)
        return block.features_ND, block


def student_view(classifier: nn.Module, layout: Layout, moe: nn.Module | None = None) -> Student:
    """The student made of a classifier's own modules (nothing is copied; ``whole`` takes the head out of it).

    Raises:
        SpecError: the head is not a single linear layer.
    """
    head = classifier.get_submodule(layout.head)
    if not isinstance(head, nn.Linear):
        raise SpecError(
            f"The head {layout.head!r} is a {type(head).__name__}, not a linear layer.",
            "Choose a backbone that ends in one linear layer.",
        )
    if layout.kind == "children":
        features = nn.Sequential(*(child for name, child in classifier.named_children() if name != layout.head))
    elif layout.kind == "features":
        relu = [nn.ReLU()] if layout.last_relu else []
        features = nn.Sequential(classifier.get_submodule("features"), *relu, nn.AdaptiveAvgPool2d(1))
    else:
        set_submodule(classifier, layout.head, nn.Identity())
        features = nn.Sequential(classifier)
    return Student(features, head, moe)


def student_key(name: str, layout: Layout, children: list[str]) -> str:
    """Name of a classifier's tensor in the student view.

    Args:
        name: name in the classifier's state dict.
        layout: the classifier's layout.
        children: names of the classifier's children, in order (``children`` layout only).
    """
    if name.startswith(layout.head + "."):
        return "classifier.0." + name.removeprefix(layout.head + ".")
    if layout.kind == "children":
        child, _, rest = name.partition(".")
        kept = [c for c in children if c != layout.head]
        return f"{FEATURES}{kept.index(child)}.{rest}"
    return f"{FEATURES}0." + (name.removeprefix("features.") if layout.kind == "features" else name)


def set_submodule(module: nn.Module, path: str, child: nn.Module) -> None:
    """Replace the submodule at dotted ``path``."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    owner._modules[name] = child
