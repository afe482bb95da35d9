"""What clients may know of a served model, and how it is worked out from the artifact's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.adaptation.base import ADAPTATIONS
from moe.student import Student
from workers.datasets.base import DatasetInfo
from workers.transforms import TransformSpec, transform_for

_LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class ServedInfo:
    """What clients may know of a model.

    Attributes:
        name: letters, digits, ``-`` and ``_``.
        version: hex digest of what is served; every state belongs to exactly one.
        task: ``multiclass``, ``binary`` or ``regression``.
        outputs: K.
        class_names: K names (one for regression; for a binary task the two classes).
        channels: C of the tensors that the network reads.
        image_size: their (height, width).
        transform: how an image becomes such a tensor; fields of ``workers.transforms.TransformSpec``.
        experts: E, or 0.
        methods: adaptation method -> None when it can be used here, else the reason why not.
    """

    name: str
    version: str
    task: str
    outputs: int
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]
    transform: Mapping[str, Any]
    experts: int
    methods: Mapping[str, str | None]


def served_transform(data: DatasetInfo, meta: Mapping[str, Any]) -> TransformSpec:
    """The evaluation transform of the artifact's data set, for uploads of any size and colour."""
    if "transform" in meta:
        return TransformSpec(**meta["transform"])
    channels = int(meta["backbone"]["channels"])
    own = transform_for(data, meta.get("image_size"), train=False).spec
    return own.model_copy(update={"size": own.size or data.image_size, "channels": own.channels or channels})


def class_names(data: DatasetInfo, meta: Mapping[str, Any], given: Sequence[str]) -> tuple[str, ...]:
    """The given names when their number is right, else numbers."""
    outputs = int(meta["num_outputs"])
    wanted = {"regression": 1, "binary": 2}.get(data.task, outputs)
    if len(given) == wanted:
        return tuple(given)
    return ("value",) if data.task == "regression" else tuple(str(number) for number in range(wanted))


def usable_methods(base: Student, task: str, no_teacher: str) -> dict[str, str | None]:
    """Every adaptation method, with the reason why it cannot be used here (``no_teacher``: why there is no teacher)."""
    found: dict[str, str | None] = {}
    for name in ADAPTATIONS.names():
        method = ADAPTATIONS.load(name).Method
        if method.needs_teacher and no_teacher:
            found[name] = no_teacher
        else:
            found[name] = method(task=task).unfit(base, has_teacher=not no_teacher)
    return found


def plain_image(image: NDArray[Any], channels: int) -> NDArray[Any]:
    """Without transparency, and grey where one channel is read."""
    if image.dtype != np.uint8 or image.ndim != 3:
        return image
    if image.shape[2] in (2, 4) and channels in (1, 3):
        image = image[:, :, :-1]
    if image.shape[2] == 3 and channels == 1:
        grey: NDArray[np.uint8] = np.rint(image @ _LUMINANCE).astype(np.uint8)
        return grey
    return image
