"""The adaptation contract: one unlabelled support batch of a domain in, an adapted student out.

One method is one file ``moe/adaptation/<name>.py`` with a class ``Method`` derived from :class:`Adaptation` and a
nested frozen ``Config``. A method never changes the model it is given: it returns the feature tensors that
differ, by name. Importing a method does not import torch, so that listing and checking of configurations stay instant.

Three things bound what a method may do: its *reset policy* (where the next adaptation of the same state begins), the
*step cap* (:meth:`Adaptation.capped`), and :meth:`Adaptation.unfit`, the reason why it makes no sense for a model.
What happens when the outcome is worse than nothing is the guard's part (``moe.adaptation.guard``).

Shapes: S support images, E experts, D feature width, K outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from moe.errors import SpecError
from moe.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student

ADAPTATIONS = Registry("moe.adaptation", noun="adaptation method", entry_point="moepipe.adaptation")

Reset = Literal["each", "follow", "collapse"]
"""Where the next adaptation of a state begins. ``each``: always at the base model. ``follow``: at the state itself; a
collapsed outcome is dropped and the last good state stays. ``collapse``: likewise, but a collapse leads back to the
base."""


class AdaptationConfig(BaseModel):
    """Base of every method's options: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reset: Reset | None = Field(
        default=None,
        description="Where the next adaptation of a state begins: each (at the base), follow, collapse; null: the "
        "method's own policy in a stream, the base otherwise.",
    )


@dataclass(frozen=True)
class AdaptResult:
    """What a method hands back.

    Attributes:
        base: the model it was given, unchanged.
        delta: student name -> tensor that replaces the base's, all below ``features.``; the domain's state.
        loss_before: the method's own objective on the support batch before the first step, if it has one.
        loss_after: the same after the last step, if the method computes it.
        steps: optimiser steps that were taken.
        expert_weights: share of the aggregator's attention that each expert received, summing to 1, where it was used.
        logits_before: ``[S, K]`` of the model on the support batch, where the method came by them; saves a pass.
        logits_after: the same with ``delta``.
        logits_near: the same up to rounding of the statistics, ``[S, K]``, from a pass that was made anyway; shows that
            nothing collapsed, but is not the state's answer.
        memory: what the method wants to be given at the next batch of a stream (moments, averages), by name.
        facts: other numbers worth telling, by name.
    """

    base: Student
    delta: Mapping[str, Tensor] = field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None
    steps: int = 0
    expert_weights: tuple[float, ...] | None = None
    logits_before: Tensor | None = None
    logits_after: Tensor | None = None
    logits_near: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def model(self) -> Student:
        """An adapted copy. For predictions alone, ``base.run(images, delta)`` gives the same without a copy."""
        import copy

        model = copy.deepcopy(self.base)
        model.load_state_dict(dict(self.delta), strict=False)
        return model


C = TypeVar("C", bound=AdaptationConfig)


class Adaptation(ABC, Generic[C]):
    """Base class of the methods.

    Class attributes:
        Config: options of the method.
        needs_teacher: ``adapt`` needs the experts' tokens and the aggregator.
        reset: the method's own reset policy in a stream.

    Attributes:
        on_step: called with (steps done, steps in all) after each step; may raise to give up.

    Args:
        config: options; the defaults when left out.
        task: ``multiclass``, ``binary`` or ``regression``.
    """

    Config: ClassVar[type[AdaptationConfig]] = AdaptationConfig
    needs_teacher: ClassVar[bool] = False
    reset: ClassVar[Reset] = "each"

    def __init__(self, config: C | None = None, task: str = "multiclass") -> None:
        self.config: C = config if config is not None else self.Config()  # type: ignore[assignment]
        self.task = task
        self.on_step: Callable[[int, int], None] | None = None

    @abstractmethod
    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> AdaptResult:
        """Adapt to one domain.

        Args:
            model: in evaluation mode; not changed.
            support_images: unlabelled images ``[S, C, H, W]``, S >= 1.
            tokens: their features from ALL experts, ``[S, E, D]`` (nothing is excluded at test time).
            aggregator: in evaluation mode; not changed.
            generator: randomness of methods that draw mini-batches; a fixed seed when left out.
            memory: :attr:`AdaptResult.memory` of the batch before, in a stream.

        Raises:
            SpecError: an empty support batch, a teacher is missing, or the method does not fit the model.
        """

    def unfit(self, model: Student, has_teacher: bool = False) -> str | None:
        """Why this method makes no sense for ``model`` and the task, in one sentence; None when it does.

        Args:
            model: the model that would be adapted; nothing is computed.
            has_teacher: the experts and the aggregator are at hand.
        """
        return None

    def capped(self, step_cap: int | None) -> Self:
        """The same method with at most ``step_cap`` optimiser steps (None: as configured).

        Raises:
            SpecError: a cap below 1.
        """
        if step_cap is not None and step_cap < 1:
            raise SpecError(f"The step cap is {step_cap}.", "Allow at least one step, or use the method none.")
        steps = getattr(self.config, "steps", None)
        if step_cap is None or steps is None or steps <= step_cap:
            return self
        return type(self)(self.config.model_copy(update={"steps": step_cap}), self.task)

    def _tick(self, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(done, total)


def require_support(support_images: Tensor) -> None:
    """Raises SpecError when there is no image to adapt on."""
    if support_images.shape[0] == 0:
        raise SpecError("The support batch is empty.", "Give at least one unlabelled image of the domain.")


def make(name: str, options: Mapping[str, Any] | None = None, task: str = "multiclass") -> Adaptation[Any]:
    """The method ``name`` with ``options`` (its ``Config`` fields).

    Raises:
        SpecError: no such method.
        pydantic.ValidationError: options that do not fit.
    """
    method: type[Adaptation[Any]] = ADAPTATIONS.load(name).Method
    return method(method.Config(**(options or {})), task)


def fitting(model: Student, task: str, has_teacher: bool) -> dict[str, str | None]:
    """Every method of the registry -> None when it makes sense for ``model``, else the reason why not.

    Args:
        model: the model that would be adapted.
        task: ``multiclass``, ``binary`` or ``regression``.
        has_teacher: experts and aggregator are at hand.
    """
    return {name: make(name, task=task).unfit(model, has_teacher) for name in ADAPTATIONS.names()}
