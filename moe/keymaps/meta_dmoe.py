"""Names of Meta-DMoE's public checkpoints: files, tensors and shapes, in both directions.

The public code (repository ``n3il666/Meta-DMoE``) stores plain state dicts: experts as raw torchvision classifiers,
students as ``features.`` and ``classifier.0.``, aggregators ("selector") under the names that ``moe.aggregator`` uses
itself. So importing and exporting is a strict check of names and shapes, plus the renaming between classifier and
student (``moe.backbones.classifier_to_student``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe.aggregator import Aggregator
from moe.backbones import build_classifier, build_student, check_state
from moe.errors import CheckpointError, SpecError, nearest
from moe.specs import BackboneSpec
from moe.student import FEATURES

Part = Literal["student", "expert", "expert_feature", "selector"]
Shapes = dict[str, tuple[int, ...]]

OFFICIAL_NAMES = {"iwildcam": "iwildcam", "camelyon17": "camelyon", "rxrx1": "rxrx1", "fmow": "fmow"}
"""Registry name of a data set -> its name in public file names."""

BACKBONES = {
    "iwildcam": "torchvision:resnet50",
    "camelyon": "torchvision:densenet121",
    "rxrx1": "torchvision:resnet50",
    "fmow": "torchvision:densenet121",
}
"""Public name -> backbone of its experts and students."""


@dataclass(frozen=True)
class OfficialFiles:
    """Public file names of one run, relative to ``model/{dataset}/``."""

    split: str
    experts: tuple[str, ...]
    pretrained_selector: str
    pretrained_student: str
    meta_selector: str
    meta_student: str


def official_name(dataset: str) -> str:
    """Public name of a data set, given either name.

    Raises:
        SpecError: there are no public checkpoints of it.
    """
    if dataset in OFFICIAL_NAMES.values():
        return dataset
    if dataset not in OFFICIAL_NAMES:
        raise SpecError(f"Meta-DMoE has no public checkpoints for {dataset!r}.", nearest(dataset, OFFICIAL_NAMES))
    return OFFICIAL_NAMES[dataset]


def official_files(dataset: str, num_experts: int, seed: int) -> OfficialFiles:
    """File names of a run, e.g. ``camelyon_5experts_seed3407_meta_student_best.pth``.

    Raises:
        SpecError: as :func:`official_name`.
    """
    name = f"{official_name(dataset)}_{num_experts}experts_seed{seed}"
    return OfficialFiles(
        split="domain_split.pkl",
        experts=tuple(f"{name}_{i}_exp_best.pth" for i in range(num_experts)),
        pretrained_selector=f"{name}_pretrained_selector_best.pth",
        pretrained_student=f"{name}_pretrained_exp_best.pth",
        meta_selector=f"{name}_meta_selector_best.pth",
        meta_student=f"{name}_meta_student_best.pth",
    )


def backbone_of(dataset: str) -> BackboneSpec:
    """Backbone of the public checkpoints of ``dataset`` (either name)."""
    return BackboneSpec(name=BACKBONES[official_name(dataset)])


def backbone_shapes(part: str, backbone: BackboneSpec, num_outputs: int) -> Shapes:
    """Names and shapes of a public ``student``, ``expert`` or ``expert_feature`` (the latter is never stored).

    Raises:
        SpecError: another part.
    """
    with torch.device("meta"):
        if part == "expert":
            return _shapes(build_classifier(backbone, num_outputs))
        shapes = _shapes(build_student(backbone, num_outputs))
    if part == "student":
        return shapes
    if part == "expert_feature":
        return {name: shape for name, shape in shapes.items() if name.startswith(FEATURES)}
    raise SpecError(f"There is no backbone part {part!r}.", nearest(part, ("student", "expert", "expert_feature")))


def selector_shapes(dim: int, num_outputs: int, depth: int = 1, heads: int = 16, mlp_ratio: float = 2.0) -> Shapes:
    """Names and shapes of a public aggregator."""
    with torch.device("meta"):
        return _shapes(Aggregator(dim, num_outputs, depth, heads, mlp_ratio))


def check_official(state: Mapping[str, Tensor], shapes: Shapes, what: str) -> dict[str, Tensor]:
    """The tensors of a public checkpoint, checked; the same function serves import and export.

    Args:
        state: tensors by name.
        shapes: :func:`backbone_shapes` or :func:`selector_shapes`.
        what: file or part, for the message.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors, by name; or an MoE student, which the public
            format cannot hold.
    """
    blocks = sorted(name for name in state if name.startswith("moe."))
    if blocks:
        raise CheckpointError(
            f"{what} has an MoE block ({blocks[0]}, ...), which the official format cannot hold.",
            "Export a student without MoE block, or keep the safetensors file.",
        )
    check_state(state, shapes, f"{what} does not have the official tensors")
    return dict(state)


def selector_arguments(state: Mapping[str, Tensor], heads: int = 16) -> dict[str, int | float]:
    """Constructor arguments of the aggregator that a public state dict holds; heads cannot be read from it.

    Raises:
        CheckpointError: it is not an aggregator.
    """
    try:
        outputs, dim = state["mlp.1.weight"].shape
        hidden = state["transformer.layers.0.1.fn.net.0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"This is not an aggregator: {error} is missing.", "Check which file was given."
        ) from None
    depth = len({name.split(".")[2] for name in state if name.startswith("transformer.layers.")})
    return {"dim": dim, "num_outputs": outputs, "depth": depth, "heads": heads, "mlp_ratio": hidden / dim}


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
