"""Losses by task, their predictions, and the record in which every algorithm returns them.

Tasks are those of ``workers.datasets``: ``multiclass`` (softmax cross-entropy), ``binary`` (cross-entropy on one
logit) and ``regression`` (squared error). Source: Meta-DMoE (arXiv 2210.03885), section 3 and public code.

Shapes: B batch, K outputs (1 for binary and regression), D feature width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import SpecError, nearest

Task = Literal["multiclass", "binary", "regression"]
TASKS: tuple[Task, ...] = ("multiclass", "binary", "regression")


@dataclass(frozen=True)
class Losses:
    """What a step minimises, and the named scalars it consists of.

    Attributes:
        total: scalar with a graph.
        parts: name -> scalar; only for records, not added up again.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


def task_loss(task: str, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Mean loss over the batch, computed in float32 or wider.

    Args:
        task: ``multiclass`` (labels int64 ``[B]``), ``binary`` (labels 0/1, ``[B]`` or ``[B, 1]``, K = 1) or
            ``regression`` (float labels, ``[B]`` or ``[B, K]``).
        logits_BK: raw outputs ``[B, K]``.
        labels_B: targets.

    Raises:
        SpecError: unknown task, or K does not fit it.
    """
    logits_BK = _wide(logits_BK)
    if task == "multiclass":
        return F.cross_entropy(logits_BK, labels_B)
    target_BK = labels_B.reshape(labels_B.shape[0], -1).to(logits_BK.dtype)
    if task == "binary":
        _one_output(task, logits_BK)
        return F.binary_cross_entropy_with_logits(logits_BK, target_BK)
    if task == "regression":
        if target_BK.shape != logits_BK.shape:
            raise SpecError(
                f"Regression outputs have shape {tuple(logits_BK.shape)}, labels {tuple(target_BK.shape)}.",
                "Set num_outputs to the number of target values.",
            )
        return F.mse_loss(logits_BK, target_BK)
    raise SpecError(f"There is no task named {task!r}.", nearest(task, TASKS))


def predict(task: str, logits_BK: Tensor) -> Tensor:
    """Predictions ``[B]``: int64 classes (``binary``: logit > 0), or the float value itself for ``regression``.

    Raises:
        SpecError: unknown task, or K does not fit it.
    """
    if task == "multiclass":
        return logits_BK.argmax(dim=-1)
    if task == "binary":
        _one_output(task, logits_BK)
        return (logits_BK[:, 0] > 0).long()
    if task == "regression":
        _one_output(task, logits_BK)
        return _wide(logits_BK)[:, 0]
    raise SpecError(f"There is no task named {task!r}.", nearest(task, TASKS))


def task_of(num_outputs: int) -> Task:
    """The task that the public code of Meta-DMoE infers from the number of outputs: 1 is binary."""
    return "binary" if num_outputs == 1 else "multiclass"


def l2_loss(input_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Mean of ``(target - input)^2`` over the batch AND the features; gradients flow to both.

    Source: Meta-DMoE, equation 3 (public code: mean, not sum, over the feature dimension).
    """
    return (_wide(target_BD) - _wide(input_BD)).square().mean()


def entropy(task: str, logits_BK: Tensor) -> Tensor:
    """Mean entropy of the predicted distribution in nats (Tent, arXiv 2006.10726, equation 1).

    Raises:
        SpecError: ``regression`` has no predicted distribution.
    """
    logits_BK = _wide(logits_BK)
    if task == "multiclass":
        log_p_BK = logits_BK.log_softmax(dim=-1)
        return -(log_p_BK.exp() * log_p_BK).sum(dim=-1).mean()
    if task == "binary":
        return (F.softplus(logits_BK) - logits_BK * logits_BK.sigmoid()).mean()
    raise SpecError(f"Task {task!r} predicts no distribution, so it has no entropy.", "Use bn or distill instead.")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _one_output(task: str, logits_BK: Tensor) -> None:
    if logits_BK.ndim != 2 or logits_BK.shape[1] != 1:
        raise SpecError(
            f"Task {task!r} needs one output per row, not outputs of shape {tuple(logits_BK.shape)}.",
            "Set num_outputs to 1.",
        )
