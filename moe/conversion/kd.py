"""The loss of a student module: its labels, and the teacher hybrid's logits.

``loss = (1 - alpha) * CE(z_S, y) + alpha * KD``; soft: ``KD = tau^2 * KL(softmax(z_T / tau) || softmax(z_S / tau))``,
hard: cross-entropy to the teacher's best class. Sources: Hinton et al. (arXiv 1503.02531), DeiT (2012.12877, section
3), m2mKD (2402.16918, section 4, public code).

- Parity: the KL sum is divided by batch x classes, not by the batch (``KDSpec.reduction = "official"``); with 1000
  classes the label loss therefore dominates.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.conversion.kd_specs import KDSpec
from moe.errors import RunFailed, SpecError
from moe.losses import Losses


def kd_loss(student_BK: Tensor, teacher_BK: Tensor | None, target: Tensor, spec: KDSpec | None = None) -> Losses:
    """``(1 - alpha) * cross-entropy + alpha * distillation``, in float32 or wider.

    Args:
        student_BK: logits with a graph.
        teacher_BK: logits; never receives a gradient. None only for ``kind="none"``.
        target: soft labels ``[B, K]``, or int64 classes ``[B]``.
        spec: kind, alpha, tau, reduction; m2mKD's defaults when left out.

    Returns:
        Parts ``label`` and, unless ``kind`` is ``none``, ``distil`` (unweighted) and ``agreement`` (share of rows where
        both prefer the same class).

    Raises:
        SpecError: shapes that do not belong together.
        RunFailed: the teacher's logits are not finite.
    """
    spec = spec or KDSpec()
    student_BK = _wide(student_BK)
    base = F.cross_entropy(student_BK, _wide(target) if target.is_floating_point() else target)
    if spec.kind == "none":
        return Losses(base, {"label": base.detach()})
    if teacher_BK is None or teacher_BK.shape != student_BK.shape:
        seen = None if teacher_BK is None else tuple(teacher_BK.shape)
        raise SpecError(
            f"Teacher logits are {seen}, student logits {tuple(student_BK.shape)}.",
            "Teacher, meta model and last student must have the same classes.",
        )
    teacher_BK = _wide(teacher_BK.detach())
    if not bool(torch.isfinite(teacher_BK).all()):
        raise RunFailed(
            f"Teacher logits {tuple(teacher_BK.shape)} are not finite.", "Check meta model and teacher, or use float32."
        )
    if spec.kind == "hard":
        distil = F.cross_entropy(student_BK, teacher_BK.argmax(dim=1))
    else:
        log_p_BK = (student_BK / spec.tau).log_softmax(dim=1)
        log_q_BK = (teacher_BK / spec.tau).log_softmax(dim=1)
        size = student_BK.numel() if spec.reduction == "official" else student_BK.shape[0]
        distil = F.kl_div(log_p_BK, log_q_BK, reduction="sum", log_target=True) * (spec.tau**2 / size)
    agreement = (student_BK.detach().argmax(dim=1) == teacher_BK.argmax(dim=1)).to(base.dtype).mean()
    total = (1 - spec.alpha) * base + spec.alpha * distil
    return Losses(total, {"label": base.detach(), "distil": distil.detach(), "agreement": agreement})


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
