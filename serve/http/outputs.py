"""From logits to what people read: probabilities, labels, confidences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from serve.info import ServedInfo

Floats = NDArray[np.floating[Any]]


def probabilities(info: ServedInfo, logits_BK: Floats) -> Floats:
    """``[B, classes]``: softmax, for a single binary output the sigmoid and its complement; not for regression."""
    if info.task == "binary" and logits_BK.shape[1] == 1:
        positive = 0.5 * (1 + np.tanh(0.5 * logits_BK.astype(np.float64)))
        return np.concatenate([1 - positive, positive], axis=1)
    shifted = logits_BK.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    out: Floats = powers / powers.sum(axis=1, keepdims=True)
    return out


def labels(info: ServedInfo, logits_BK: Floats) -> list[str]:
    """The name of the most probable class of each row."""
    return [class_name(info, int(index)) for index in probabilities(info, logits_BK).argmax(axis=1)]


def class_name(info: ServedInfo, index: int) -> str:
    """Name of class ``index``, or the number itself."""
    return info.class_names[index] if index < len(info.class_names) else str(index)


def readable(info: ServedInfo, logits_BK: Floats) -> list[dict[str, Any]]:
    """Per row: label, index and confidence; for regression the value as label and no confidence."""
    if info.task == "regression":
        return [
            {"label": f"{float(row[0]):.4g}", "index": None, "confidence": None, "value": float(row[0])}
            for row in logits_BK
        ]
    rows = probabilities(info, logits_BK)
    best = rows.argmax(axis=1)
    return [
        {"label": class_name(info, int(k)), "index": int(k), "confidence": float(row[k]), "value": None}
        for row, k in zip(rows, best, strict=True)
    ]


def ranked(info: ServedInfo, values_BK: Floats, count: int) -> list[str]:
    """``score:index:name`` of the ``count`` largest values of each row, in order; the classification extension."""
    order = np.argsort(-values_BK, axis=1, kind="stable")[:, :count]
    return [
        f"{float(row[k]):f}:{int(k)}:{class_name(info, int(k))}"
        for row, chosen in zip(values_BK, order, strict=True)
        for k in chosen
    ]
