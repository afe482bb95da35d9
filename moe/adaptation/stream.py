"""Streaming adaptation: a state that follows a stream of unlabelled batches, under the same guard as a single one.

Each batch is one call of a method that begins where the reset policy says: at the base model (``each``) or at the state
so far. The guard compares the new state with the *base*, on the batch and over the last ``window`` images, so neither
many small steps nor batches of a few images hide a collapse. A collapsed or refused batch is dropped: the last good
state and its memory stay (``follow``), or the stream begins again at the base (``collapse``, and after ``patience``
collapsed batches in a row).

The model is never changed or copied: a state is laid over it (:func:`overlay`), sharing all tensors that did not move.

Shapes: S images of a batch, E experts, K outputs.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moe.adaptation.base import Adaptation, AdaptResult, Reset
from moe.adaptation.guard import Check, GuardSpec, judge, not_finite
from moe.errors import SpecError
from moe.losses import predict

if TYPE_CHECKING:
    from moe.aggregator import Aggregator
    from moe.student import Student


class StreamSpec(BaseModel):
    """How a stream is followed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reset_every: int | None = Field(default=None, ge=1, description="Begin at the base again after so many batches.")
    patience: int = Field(default=3, ge=1, description="Collapsed batches in a row that lead back to the base.")
    window: int = Field(default=32, ge=2, description="Latest images on which a collapse is looked for.")
    guard: GuardSpec = Field(default_factory=GuardSpec, description="Limits of the guard.")


@dataclass(frozen=True)
class StreamState:
    """What a stream carries from batch to batch; immutable, so that a rollback is keeping the old one.

    Attributes:
        delta: student name -> tensor that replaces the base's.
        memory: the method's memory.
        since_reset: batches taken up since the base.
        dropped: collapsed batches in a row.
    """

    delta: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    since_reset: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class StreamStep:
    """What one batch did.

    Attributes:
        number: batches seen, this one included.
        logits_SK: predictions for the batch by the state after it.
        moved: the state took this batch up.
        reset: the step began at, or fell back to, the base model, and why; None when neither.
        check: the guard's outcome.
        result: what the method handed back (its delta is not the whole state), or None when it refused the batch.
    """

    number: int
    logits_SK: Tensor
    moved: bool
    reset: str | None
    check: Check
    result: AdaptResult | None


class Stream:
    """A state that follows a stream.

    Args:
        model: the base, in evaluation mode; not changed. Parameters that may move must require gradients.
        method: its configuration's ``reset``, else its own reset policy, is followed.
        spec: see :class:`StreamSpec`.
        aggregator: for methods that need the teacher.
        seed: of the methods' draws; each batch has its own generator.
        state: continue from here.
    """

    def __init__(
        self,
        model: Student,
        method: Adaptation[Any],
        spec: StreamSpec | None = None,
        aggregator: Aggregator | None = None,
        seed: int = 0,
        state: StreamState | None = None,
    ) -> None:
        self.model, self.method, self.aggregator, self.seed = model, method, aggregator, seed
        self.spec = spec or StreamSpec()
        self.policy: Reset = method.config.reset or method.reset
        self.state = state or StreamState()
        self.batches = 0
        self._seen: deque[tuple[Any, Any]] = deque(maxlen=self.spec.window)

    def observe(self, images: Tensor, tokens: Tensor | None = None) -> StreamStep:
        """Take the next batch: adapt, judge, keep or drop, predict.

        Args:
            images: ``[S, C, H, W]``, S >= 1.
            tokens: the experts' features ``[S, E, D]``, for methods that need them.

        Raises:
            SpecError: an empty batch, or a teacher that is missing.
        """
        if images.shape[0] == 0:
            raise SpecError("The batch is empty.", "Give at least one image.")
        if self.method.needs_teacher and (tokens is None or self.aggregator is None):
            raise SpecError("The method needs the experts' features and the aggregator.", "Use bn, tent or eata.")
        self.batches += 1
        start, why = self._start()
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.batches) % 2**63)
        with torch.no_grad():
            base_SK = self.model(images)
        try:
            result = self.method.adapt(
                overlay(self.model, start.delta), images, tokens, self.aggregator, generator, start.memory
            )
        except SpecError as error:  # a batch too small for the method: the state stays
            return self._drop(images, base_SK, Check(False, reason=str(error)), None, why)
        delta = {**start.delta, **result.delta}
        check, logits_SK = self._check(images, base_SK, replace(result, base=self.model, delta=delta))
        if check.collapsed:
            return self._drop(images, base_SK, check, result, why)
        self.state = StreamState(delta, result.memory, start.since_reset + 1, 0)
        return StreamStep(self.batches, logits_SK, True, why, check, result)

    def _start(self) -> tuple[StreamState, str | None]:
        """Where this batch begins, and why at the base if there."""
        if self.policy == "each":
            return StreamState(dropped=self.state.dropped), "each batch begins at the base"
        if self.spec.reset_every is not None and self.state.since_reset >= self.spec.reset_every:
            return StreamState(dropped=self.state.dropped), f"{self.spec.reset_every} batches have passed"
        return self.state, None

    def _check(self, images: Tensor, base_SK: Tensor, result: AdaptResult) -> tuple[Check, Tensor]:
        """The guard's outcome for batch and window; the batch enters the window only when nothing is wrong."""
        broken = not_finite(result)
        if broken is not None:
            return broken, base_SK
        if result.logits_after is not None:
            logits_SK = result.logits_after
        else:
            with torch.no_grad():
                logits_SK = self.model.run(images, result.delta).logits_BK
        if not bool(logits_SK.isfinite().all()):
            return Check(True, "not-finite", "The adapted model's predictions are NaN or infinite."), base_SK
        task = self.method.task
        pairs = list(zip(predict(task, base_SK).tolist(), predict(task, logits_SK).tolist(), strict=True))
        check = _judged(pairs, result, task, self.spec.guard)
        window = [*self._seen, *pairs][-self.spec.window :]
        if not check.collapsed and len(window) > len(pairs):
            check = _judged(window, result, task, self.spec.guard)
        if not check.collapsed:
            self._seen.extend(pairs)
        return check, logits_SK

    def _drop(
        self, images: Tensor, base_SK: Tensor, check: Check, result: AdaptResult | None, why: str | None
    ) -> StreamStep:
        """Roll back, or begin again at the base where policy or patience say so; predict with what is left."""
        dropped = self.state.dropped + check.collapsed
        if check.collapsed and (self.policy == "collapse" or dropped >= self.spec.patience):
            self.state = StreamState()
            self._seen.clear()
            why = "the state collapsed" if self.policy == "collapse" else f"{dropped} batches in a row collapsed"
            return StreamStep(self.batches, base_SK, False, why, check, result)
        self.state = StreamState(dropped=dropped) if self.policy == "each" else replace(self.state, dropped=dropped)
        with torch.no_grad():
            logits_SK = self.model.run(images, self.state.delta).logits_BK
        return StreamStep(self.batches, logits_SK, False, why, check, result)


def _judged(pairs: list[tuple[Any, Any]], result: AdaptResult, task: str, spec: GuardSpec) -> Check:
    """The guard's outcome for (base's, state's) predictions."""
    before, after = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return judge(before, after, result, task, spec)


def overlay(model: Student, delta: Mapping[str, Tensor]) -> Student:
    """A student with ``delta`` in place, sharing every other tensor with ``model``; neither may be changed in place.

    Raises:
        SpecError: a name that the model does not have.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    laid = copy.deepcopy(model, shared)
    for name, value in delta.items():
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = laid.get_submodule(owner_name)
        except AttributeError:
            owner = None
        if owner is not None and owner._parameters.get(leaf) is not None:
            old = owner._parameters[leaf]
            moving = old is not None and old.requires_grad
            owner._parameters[leaf] = torch.nn.Parameter(value.detach(), requires_grad=moving)
        elif owner is not None and leaf in owner._buffers:
            owner._buffers[leaf] = value.detach()
        else:
            raise SpecError(f"The state names {name!r}, which the model does not have.", "It belongs to another model.")
    return laid
