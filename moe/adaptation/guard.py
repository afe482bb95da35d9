"""The collapse guard: is an adapted state still a model, or has it fallen into saying one thing?

Without labels nobody can tell whether an adaptation helped, but its failures are easy to see. A state is *collapsed*
when, on the images it was adapted on,

1. ``not-finite``: one of its tensors, its predictions or its loss is NaN or infinite;
2. ``class-entropy``: the distribution of its predicted classes has less than ``keep_entropy`` of the entropy that the
   base model's has (nearly everything became one class, the way entropy minimisation fails: Niu et al.,
   arXiv 2302.12400). For a regression: the spread of its values shrank that far;
3. ``loss``: the method's own objective grew by more than the factor ``loss_growth``.

The second needs ``min_images`` images and a base model that predicts more than one class. A domain may rightly be of
one class: then base and adapted state agree about it, or the limit is to be lowered. Rollback is the caller's part and
simple, since methods never change a model: the new delta is dropped.

With ``brief`` no pass is made whose outcome could not change the verdict: the base's class entropy is at most that of
all classes alike, so a state whose entropy is enough even against that needs no pass of the base; and logits that are
nearly the state's (``AdaptResult.logits_near``) acquit a state that is far from every limit; they never convict, and
whatever lies near a limit is looked at exactly. The first is a proof, the second a margin: batch norm's estimating pass
predicts with the batch's variance, the state with the unbiased one.

Shapes: S images, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe.adaptation.base import AdaptResult

if TYPE_CHECKING:
    from torch import Tensor

    from moe.student import Student

Criterion = Literal["not-finite", "class-entropy", "loss"]
_CLEAR = 1.5  # factor above a limit from which predictions that are right up to rounding decide
_MANY_CLASSES = 0.05  # nats (or relative spread): below it the base says one thing itself, and there is nothing to lose


class GuardSpec(BaseModel):
    """Limits of the guard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="False still refuses NaN and infinity.")
    keep_entropy: float = Field(
        default=0.3, ge=0, le=1, description="Share of the base's class entropy (or spread) that must be left."
    )
    loss_growth: float = Field(default=1.25, ge=1, description="Factor by which the method's loss may grow.")
    min_images: int = Field(default=8, ge=2, description="Images from which the predicted classes are judged.")
    max_images: int = Field(default=256, ge=2, description="Images that are looked at, evenly spread; more cost time.")


@dataclass(frozen=True)
class Check:
    """Outcome of the guard.

    Attributes:
        collapsed: the state must not be used.
        criterion: which one was met, or None.
        reason: the same in words with the values seen (of a stream also: why a batch was refused); empty when nothing
            is wrong.
        images: images looked at.
        entropy_before: entropy of the classes that the base model predicts, nats (regression: standard deviation of its
            values); None when nothing was looked at, or the verdict did not need it.
        entropy_after: the same of the adapted state.
        top_share_before: share of the class that the base predicts most; None for a regression, and as above.
        top_share_after: the same of the adapted state.
        changed: share of images whose predicted class changed; None for a regression, and as above.
    """

    collapsed: bool
    criterion: Criterion | None = None
    reason: str = ""
    images: int = 0
    entropy_before: float | None = None
    entropy_after: float | None = None
    top_share_before: float | None = None
    top_share_after: float | None = None
    changed: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All attributes, for JSON (NaN and infinity do not occur)."""
        return asdict(self)


def check(
    model: Student,
    images: Tensor,
    result: AdaptResult,
    task: str,
    spec: GuardSpec | None = None,
    brief: bool = False,
) -> Check:
    """Judge what a method handed back.

    The logits that the method came by are used; passes are made only for what is missing.

    Args:
        model: the base model, unadapted.
        images: the support batch ``[S, C, H, W]``.
        result: outcome of adapting ``model`` itself on ``images``.
        task: ``multiclass``, ``binary`` or ``regression``.
        spec: limits; the defaults when left out.
        brief: make no pass that the verdict does not need; figures that would need it are None.
    """
    from moe.adaptation._norm import predict_in_chunks
    from moe.losses import predict

    spec = spec or GuardSpec()
    if not result.delta:
        return Check(False)
    broken = not_finite(result)
    if broken is not None:
        return broken
    rows = _spread_rows(images.shape[0], spec.max_images)
    seen = images if len(rows) == images.shape[0] else images[rows]
    before, after = result.logits_before, result.logits_after
    if brief and before is None and after is None and result.logits_near is not None:
        acquitted = _acquitted(result.logits_near[rows], result, task, spec, _CLEAR)
        if acquitted is not None:
            return acquitted
    after = predict_in_chunks(model, seen, result.delta, spec.max_images) if after is None else after[rows]
    if brief and before is None:
        acquitted = _acquitted(after, result, task, spec)
        if acquitted is not None:
            return acquitted
    before = predict_in_chunks(model, seen, None, spec.max_images) if before is None else before[rows]
    if not bool(after.isfinite().all()):
        return Check(True, "not-finite", "The adapted model's predictions are NaN or infinite.", len(rows))
    return judge(predict(task, before), predict(task, after), result, task, spec)


def not_finite(result: AdaptResult) -> Check | None:
    """A failed check when a tensor or a loss of ``result`` is NaN or infinite, else None."""
    for name, value in result.delta.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return Check(True, "not-finite", f"The adapted tensor {name} holds NaN or infinite values.")
    for when, loss in (("before", result.loss_before), ("after", result.loss_after)):
        if loss is not None and not math.isfinite(loss):
            return Check(True, "not-finite", f"The loss {when} the adaptation is {loss}.")
    return None


def judge(before_S: Tensor, after_S: Tensor, result: AdaptResult, task: str, spec: GuardSpec) -> Check:
    """Apply the second and third criterion.

    Args:
        before_S: predictions of the base model (``moe.losses.predict``), S >= 1.
        after_S: predictions of the adapted state for the same images.
        result: its losses are compared.
        task: decides whether predictions are classes or values.
        spec: limits.
    """
    facts = _facts(before_S, after_S, task)
    count = len(before_S)
    criterion: Criterion | None = None
    reason = ""
    left, had = facts["entropy_after"], facts["entropy_before"]
    if spec.enabled and count >= spec.min_images and had > _MANY_CLASSES and left < spec.keep_entropy * had:
        criterion = "class-entropy"
        what = "spread of the predicted values" if task == "regression" else "entropy of the predicted classes"
        reason = f"The {what} fell from {had:.3g} to {left:.3g}, below {spec.keep_entropy:.0%} of it."
    elif spec.enabled and _grew(result, spec.loss_growth):
        criterion = "loss"
        reason = (
            f"The method's loss grew from {result.loss_before:.4g} to {result.loss_after:.4g}, "
            f"more than {spec.loss_growth:g} times."
        )
    return Check(criterion is not None, criterion, reason, count, **facts)


def _acquitted(after_SK: Tensor, result: AdaptResult, task: str, spec: GuardSpec, clear: float = 1.0) -> Check | None:
    """The check when ``after_SK`` alone shows that no criterion is met, whatever the base says; else None.

    Args:
        after_SK: logits of the adapted state.
        result: its losses are compared.
        task: decides how classes are counted; values of a regression have no highest spread.
        spec: limits.
        clear: factor above the limit that is asked for.
    """
    from moe.losses import predict

    count = after_SK.shape[0]
    if not bool(after_SK.isfinite().all()) or (spec.enabled and _grew(result, spec.loss_growth)):
        return None
    after_S = predict(task, after_SK)
    facts = _side(after_S, task)
    if spec.enabled and count >= spec.min_images:
        if task == "regression":
            return None
        highest = math.log(min(count, 2 if task == "binary" else after_SK.shape[1]))
        if facts["entropy"] < clear * spec.keep_entropy * highest:
            return None
    return Check(False, images=count, entropy_after=facts["entropy"], top_share_after=facts.get("top_share"))


def _grew(result: AdaptResult, factor: float) -> bool:
    if result.loss_before is None or result.loss_after is None:
        return False
    return result.loss_after > factor * result.loss_before + 1e-6


def _facts(before_S: Tensor, after_S: Tensor, task: str) -> dict[str, Any]:
    sides = {"before": _side(before_S, task), "after": _side(after_S, task)}
    facts: dict[str, Any] = {f"{key}_{when}": value for when, side in sides.items() for key, value in side.items()}
    return facts if task == "regression" else {**facts, "changed": float((before_S != after_S).double().mean())}


def _side(predicted_S: Tensor, task: str) -> dict[str, float]:
    """Entropy of the predicted classes and share of the most frequent one; for a regression the spread alone."""
    if task == "regression":
        return {"entropy": float(predicted_S.double().std(correction=0))}
    p_C = _shares(predicted_S)
    return {"entropy": max(0.0, float(-(p_C * p_C.log()).sum())), "top_share": float(p_C.max())}


def _shares(classes_S: Tensor) -> Tensor:
    """Share of each class that occurs."""
    counts_C: Tensor = classes_S.long().bincount().double()
    present_C = counts_C[counts_C > 0]
    return present_C / present_C.sum()


def _spread_rows(count: int, most: int) -> list[int]:
    """At most ``most`` row numbers, evenly spread over ``count``."""
    if count <= most:
        return list(range(count))
    return [index * count // most for index in range(most)]


def guarded(
    model: Student, images: Tensor, result: AdaptResult, task: str, spec: GuardSpec | None = None
) -> tuple[Mapping[str, Tensor], Check]:
    """The delta to use from here on, with the check: that of ``result``, or nothing when it collapsed (rollback)."""
    found = check(model, images, result, task, spec)
    return ({} if found.collapsed else result.delta), found
