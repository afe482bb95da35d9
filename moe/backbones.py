"""Builds classifiers and students from a :class:`moe.specs.BackboneSpec`, and renames weights between the two.

No file is read here: ``workers.weights`` fills in pretrained weights. torchvision and timm are imported when needed.
Sources: torchvision (ResNet arXiv 1512.03385, DenseNet 1608.06993, MobileNetV2 1801.04381), timm, DINOv2 2304.07193.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, SpecError
from moe.jetpack_specs import JetViTSpec
from moe.layers.block import MoEBlock
from moe.models.mnist_cnn import MnistCNN
from moe.models.vit_specs import VMoESpec
from moe.specs import TORCHVISION_CHILDREN, BackboneSpec, StudentMoESpec
from moe.student import Layout, Student, StudentOutput, set_submodule, student_key, student_view
from moe.tiny import DEFAULT_WIDTH, TinyCNN

__all__ = [
    "Student",
    "StudentOutput",
    "build_classifier",
    "build_student",
    "check_state",
    "classifier_to_student",
    "feature_dim",
    "layout_of",
    "student_to_classifier",
]

VIT_SMALL = "vit_small_patch14_dinov2"
S = TypeVar("S", JetViTSpec, VMoESpec)


def build_classifier(spec: BackboneSpec, num_outputs: int) -> nn.Module:
    """The network with a fresh, default-initialised linear head; state-dict keys as in torchvision or timm.

    Args:
        spec: architecture; ``pretrained`` is not looked at.
        num_outputs: K >= 1.

    Raises:
        SpecError: timm does not know the name, or the network does not end in one linear layer.
    """
    model = _network(spec, num_outputs)
    layout = layout_of(spec, model)
    try:
        head = model.get_submodule(layout.head)
    except AttributeError:
        head = None
    if not isinstance(head, nn.Linear):
        raise SpecError(
            f"{spec.name!r} does not end in one linear layer ({layout.head}: {type(head).__name__}).",
            "Choose a backbone with a linear head.",
        )
    set_submodule(model, layout.head, nn.Linear(head.in_features, num_outputs))
    return model


def build_student(spec: BackboneSpec, num_outputs: int, moe: StudentMoESpec | None = None) -> Student:
    """A student of this architecture, randomly initialised, with an MoE block when ``moe`` is given.

    The block is made last, so that the same generator state gives the same dense weights with and without it.

    Raises:
        SpecError: as :func:`build_classifier`.
    """
    classifier = build_classifier(spec, num_outputs)
    student = student_view(classifier, layout_of(spec, classifier))
    if moe is not None:
        student.moe = MoEBlock(student.feature_dim, moe)
    return student


def feature_dim(spec: BackboneSpec) -> int:
    """Width D of the features, without allocating the network."""
    with torch.device("meta"):
        return build_student(spec, 1).feature_dim


def layout_of(spec: BackboneSpec, model: nn.Module) -> Layout:
    """How ``model``, built from ``spec``, falls apart.

    Raises:
        SpecError: a timm model with several heads, or none.
    """
    name = spec.name.removeprefix("torchvision:")
    if name == "tiny_cnn" or name in TORCHVISION_CHILDREN:
        return Layout("children", "fc")
    if name in ("mnist_cnn", "jetvit", "vmoe"):
        return Layout("whole", "head")
    if spec.name.startswith("torchvision:"):
        return Layout("features", "classifier", spec.last_relu)
    if name == "mobilenet_v2_sort":
        return Layout("features", "classifier.1")
    head = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(head, str):
        raise SpecError(f"{spec.name!r} has the heads {head!r}; exactly one is needed.", "Choose another timm model.")
    return Layout("whole", head)


def classifier_to_student(spec: BackboneSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a classifier's weights for a student without MoE block (the official key map).

    Raises:
        CheckpointError: names missing, unexpected and wrongly shaped tensors.
    """
    names, shapes = _key_map(spec, state, "classifier")
    check_state(state, shapes, f"These weights are not a {spec.name} classifier")
    return {names[name]: value for name, value in state.items()}


def student_to_classifier(spec: BackboneSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`classifier_to_student`.

    Raises:
        CheckpointError: as there; also when the student has an MoE block, which a classifier cannot hold.
    """
    if any(name.startswith("moe.") for name in state):
        raise CheckpointError(
            "The student has an MoE block, which a plain classifier cannot hold.", "Keep it a student."
        )
    names, shapes = _key_map(spec, state, "student")
    back = {new: old for old, new in names.items()}
    check_state(state, {names[old]: s for old, s in shapes.items()}, f"These weights are not a {spec.name} student")
    return {back[name]: value for name, value in state.items()}


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compare names and shapes.

    Args:
        state: tensors by name.
        shapes: what is expected.
        what: beginning of the message.

    Raises:
        CheckpointError: the first few missing, unexpected and wrongly shaped tensors of each kind, with their number.
    """
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = {
        "missing": [name for name in shapes if name not in state],
        "unexpected": [name for name in state if name not in shapes],
        "of another shape": wrong,
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if parts:
        raise CheckpointError(f"{what}: {'; '.join(parts)}.", "Check backbone, number of outputs and kind of file.")


def _key_map(
    spec: BackboneSpec, state: Mapping[str, Tensor], form: str
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Classifier name -> student name, and classifier name -> shape, with the head's K read from ``state``."""
    with torch.device("meta"):
        probe = build_classifier(spec, 1)
    layout = layout_of(spec, probe)
    head = (layout.head if form == "classifier" else "classifier.0") + ".weight"
    if head not in state or state[head].ndim != 2:
        seen = tuple(state[head].shape) if head in state else "nothing"
        raise CheckpointError(
            f"The head {head!r} of a {spec.name} {form} is {seen} in this file.",
            f"First names in it: {', '.join(list(state)[:4]) or 'none'}. Check backbone and kind of file.",
        )
    children = [name for name, _ in probe.named_children()]
    own = probe.state_dict()
    names = {name: student_key(name, layout, children) for name in own}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    outputs = state[head].shape[0]
    shapes[f"{layout.head}.weight"] = (outputs, shapes[f"{layout.head}.weight"][1])
    shapes[f"{layout.head}.bias"] = (outputs,)
    return names, shapes


def _network(spec: BackboneSpec, num_outputs: int) -> nn.Module:
    if spec.name == "tiny_cnn":
        return TinyCNN(spec.channels, num_outputs, spec.width or DEFAULT_WIDTH)
    if spec.name == "mnist_cnn":
        return MnistCNN(spec.channels, num_outputs)
    if spec.name == "vit_small_focus" or spec.name.startswith("timm:"):
        return _timm(spec, num_outputs)
    if spec.jetvit is not None:
        from moe.models.sphero_vit import build_sphero_vit

        jetvit = build_sphero_vit(_at_size(spec.jetvit, spec), num_outputs)
        if spec.gmoe is not None:
            from moe.models.surgery import sparsify

            sparsify(jetvit, spec.gmoe)
        return _grouped(spec, jetvit)
    if spec.vmoe is not None:
        from moe.models.vmoe import build_vit

        return build_vit(_at_size(spec.vmoe, spec).model_copy(update={"num_classes": num_outputs}))
    import torchvision

    name = "mobilenet_v2" if spec.name == "mobilenet_v2_sort" else spec.name.removeprefix("torchvision:")
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    if spec.channels != 3:
        _replace_stem(model, spec.channels)
    return model


def _timm(spec: BackboneSpec, num_outputs: int) -> nn.Module:
    import timm

    name = VIT_SMALL if spec.name == "vit_small_focus" else spec.name.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise SpecError(
            f"timm has no model named {name!r}.", f"Similar: {', '.join(near)}." if near else "See timm.list_models()."
        )
    if spec.gmoe is not None:
        from moe.models.vit import gmoe_vit

        sparse: nn.Module = gmoe_vit(name, max(1, num_outputs), spec.gmoe, spec.channels, spec.image_size)
        return sparse
    arguments: dict[str, object] = {"num_classes": max(1, num_outputs), "in_chans": spec.channels}
    if spec.image_size is not None and _takes_image_size(name):
        arguments["img_size"] = spec.image_size
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    if spec.first_block is not None:
        from moe.models.vit_tail import VitTail

        return VitTail(model, spec.first_block)
    return _grouped(spec, model)


def _grouped(spec: BackboneSpec, model: nn.Module) -> nn.Module:
    """EMoE's conversion, where it is asked for, with any grouping of the neurons.

    A stored network brings its own grouping, and ``workers.weights`` groups pretrained neurons.
    """
    if spec.emoe is not None:
        from moe.models.emoe_convert import convert_layers

        split = spec.emoe.split if spec.emoe.split == "copy" else "contiguous"
        with torch.device("cpu"):  # labels are looked at, also when shapes alone are wanted
            convert_layers(model, spec.emoe_layers, spec.emoe.model_copy(update={"split": split}))
    return model


def _at_size(own: S, spec: BackboneSpec) -> S:
    """A network's description for the images that the backbone is asked for."""
    return own.model_copy(update={"channels": spec.channels, "image_size": spec.image_size or own.image_size})


def _takes_image_size(name: str) -> bool:
    """Transformers are built for one size; convolutional networks take any and refuse the argument."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def _replace_stem(model: nn.Module, channels: int) -> None:
    """A first convolution for another number of channels, initialised as torchvision's networks are."""
    name, stem = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    size, stride, padding = stem.kernel_size, stem.stride, stem.padding
    fresh = nn.Conv2d(channels, stem.out_channels, size, stride, padding, bias=stem.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
    set_submodule(model, name, fresh)
