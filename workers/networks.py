"""The network of an algorithm with the weights that it starts from: random, pretrained, or an earlier stage's.

GMoE copies dense feed-forward networks into experts and EMoE groups their neurons *after* the dense weights are there;
that order is kept here, once, for every stage that trains an algorithm of ``moe/algorithms``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moe.algorithms.base import Algorithm
from moe.errors import SpecError
from moe.specs import BackboneSpec
from workers.engines.base import ParamGroup

if TYPE_CHECKING:
    from moe.student import Student
    from workers.context import Input

FRESH = ("classifier.", "moe.")
"""Parts of a student that pretrained weights never fill: they are made for the task."""


def balance_left_out(spec: BackboneSpec) -> str:
    """Balance losses that a sparse backbone asks for, in words, for a loss that has none; empty without."""
    asked = {
        "gmoe.aux_weight": 0.0 if spec.gmoe is None or spec.gmoe.balance == "none" else spec.gmoe.aux_weight,
        "emoe.aux_weight": 0.0 if spec.emoe is None or spec.emoe.gate_noise == 0 else spec.emoe.aux_weight,
        "vmoe.balance_weight": 0.0 if spec.vmoe is None else spec.vmoe.balance_weight,
    }
    found = [f"{name}={weight:g}" for name, weight in asked.items() if weight > 0]
    return f"balance loss of experts ({', '.join(found)})" if found else ""


def build_network(method: Algorithm[Any], classes: int, data_root: Path, init: Input | None = None) -> Student:
    """The network of an algorithm with its first weights, converted where the method converts it.

    Args:
        method: an algorithm whose settings have a ``backbone``.
        classes: K.
        data_root: where weights inside Python packages may lie unpacked.
        init: a ``model`` artifact to start from, head included; of the same backbone, or of the dense one.

    Raises:
        SpecError: ``init`` has another backbone.
        NotFoundError, CheckpointError: see :func:`workers.weights.load_pretrained`.
    """
    from moe.backbones import build_classifier, classifier_to_student
    from workers.weights import load_pretrained

    if init is not None:
        return _continued(method, classes, init)
    student: Student = method.build(classes)  # type: ignore[assignment]
    spec = method.config.backbone
    if spec.pretrained is False:
        return student
    classifier = build_classifier(spec, classes)
    load_pretrained(spec, classifier, data_root)
    state = classifier_to_student(spec, classifier.state_dict())
    own = student.state_dict()
    student.load_state_dict({name: own[name] if name.startswith(FRESH) else state[name] for name in own})
    _convert(method, student)
    return student


def groups_of(method: Algorithm[Any], module: nn.Module) -> list[ParamGroup]:
    """An algorithm's parameter groups as an engine takes them."""
    return [ParamGroup(g.name, g.parameters, g.lr, g.weight_decay) for g in method.param_groups(module)]


def backbone_of(artifact: Input) -> BackboneSpec:
    """The architecture in an artifact's record.

    Raises:
        SpecError: its stage keeps none, so nothing else can go on with that network.
    """
    if "backbone" not in artifact.meta:
        raise SpecError(
            f"{artifact.path} holds a network of form {artifact.meta.get('form')!r}; this stage cannot go on with it.",
            "Check which stage is wired to this input.",
        )
    return BackboneSpec(**{**artifact.meta["backbone"], "pretrained": False})


def require_same(theirs: BackboneSpec, ours: BackboneSpec) -> None:
    """Refuse to start from weights of another network.

    Raises:
        SpecError: the two differ in more than where pretrained weights come from.
    """
    if unpretrained(theirs) != unpretrained(ours):
        raise SpecError(
            f"The network to start from is {theirs.name} ({theirs.model_dump(exclude_defaults=True)}), this stage "
            f"says {ours.name} ({ours.model_dump(exclude_defaults=True)}).",
            "Use the same backbone in both stages.",
        )


def unpretrained(spec: BackboneSpec, **changes: Any) -> BackboneSpec:
    """The architecture alone, for comparison."""
    return spec.model_copy(update={"pretrained": False, **changes})


def _continued(method: Algorithm[Any], classes: int, init: Input) -> Student:
    """The network with the weights of an artifact; dense ones are made sparse as the algorithm does it."""
    from workers.modelfile import load_student

    theirs, spec = backbone_of(init), method.config.backbone
    # Without `pretrained` an algorithm converts at once; the weights have to be there first.
    student: Student = type(method)(_with_backbone(method, pretrained=True), method.task).build(classes)  # type: ignore[assignment]
    given = load_student(init.path, init.meta).state_dict()
    if spec.gmoe is not None and unpretrained(theirs) == unpretrained(spec, gmoe=None):
        _upcycle(student, given)
    else:
        require_same(theirs, spec)
        own = student.state_dict()
        student.load_state_dict({name: own[name] if name.startswith("moe.") else given[name] for name in own})
    _convert(method, student)
    return student


def _with_backbone(method: Algorithm[Any], **changes: Any) -> Any:
    backbone = method.config.backbone.model_copy(update=changes)
    return method.config.model_copy(update={"backbone": backbone})


def _upcycle(student: Student, dense: Mapping[str, Tensor]) -> None:
    """Dense student weights into a student whose transformer has sparse blocks, the head included."""
    from timm.models.vision_transformer import VisionTransformer

    from moe.conversion.upcycle import load_upcycled

    vit = student.features[0]  # type: ignore[index]
    if not isinstance(vit, VisionTransformer):
        raise SpecError("Only a vision transformer can be made sparse from dense weights.")
    prefix = "features.0."
    load_upcycled(vit, {name.removeprefix(prefix): value for name, value in dense.items() if name.startswith(prefix)})
    head = {name: value for name, value in dense.items() if name.startswith("classifier.")}
    student.load_state_dict({**student.state_dict(), **head})


def _convert(method: Algorithm[Any], student: nn.Module) -> None:
    convert = getattr(method, "convert", None)
    if convert is not None:
        convert(student)
