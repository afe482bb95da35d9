"""Accuracy over batches, and the weights that make classes count equally."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import SpecError


def accuracy(batches: Iterable[tuple[Any, Any]], weights: Any | None = None) -> float:
    """Weighted share of right predictions: the largest of K logits, or the sign of a single one.

    Args:
        batches: (logits ``[B, K]``, labels ``[B]``), arrays or tensors. With K = 1 a logit above 0 predicts 1, and
            labels may also be ``[B, 1]``.
        weights: one per sample over all batches in order; None counts every sample once.

    Raises:
        SpecError: no samples, weights that do not fit or sum to 0, or labels that do not fit the logits.
    """
    right = np.concatenate([_right(_array(logits), _array(labels)) for logits, labels in batches] or [np.zeros(0)])
    weight = np.ones(len(right)) if weights is None else _array(weights).astype(np.float64)
    if weight.shape != right.shape:
        raise SpecError(f"Weights of shape {weight.shape} do not fit {len(right)} samples.", "Give one per sample.")
    total = float(weight.sum())
    if not total > 0:
        raise SpecError(f"The accuracy of {len(right)} samples of total weight {total} is not defined.")
    return float((weight * right).sum()) / total


def balanced_weights(labels: Any) -> NDArray[np.float32]:
    """Weight of each sample: 1 / (samples of its class * number of classes present); they sum to 1.

    Differs: computed from the list of labels (the public code decodes every image to read its label).

    Args:
        labels: integers ``[N]``.

    Returns:
        float32 ``[N]``, as the public code stores them.

    Raises:
        SpecError: not a list of integers.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise SpecError(
            f"Labels of type {values.dtype} and shape {values.shape} have no classes.", "Give integers [N]."
        )
    _, positions, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (1.0 / (counts * len(counts)))[positions].astype(np.float32)


def _right(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise SpecError(f"Logits of shape {logits.shape} are not [B, K].")
    single = logits.shape[1] == 1
    fits = [(len(logits),), (len(logits), 1)] if single else [(len(logits),)]
    if labels.shape not in fits:
        raise SpecError(f"Labels of shape {labels.shape} do not fit logits of shape {logits.shape}.")
    found = logits[:, 0] > 0 if single else logits.argmax(axis=1)
    return np.asarray(found == labels.reshape(len(logits)), dtype=np.float64)


def _array(values: Any) -> NDArray[Any]:
    """A NumPy array; tensors are detached, and half precision (which NumPy may lack) is widened."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)
