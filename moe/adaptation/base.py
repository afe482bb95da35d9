"""The adaptation contract: one unlabelled support batch of a domain in, an adapted student out.

One method is one file ``moe/adaptation/<name>.py`` with a class ``Method`` derived from :class:`Adaptation` and a
nested frozen ``Config``. A method never changes the model it is given: it returns the feature tensors that
differ, by name. Importing a method does not import torch, so that listing and checking of configurations stay instant.

Shapes: S support images, E experts, D feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from moe.errors import SpecError
from moe.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student

ADAPTATIONS = Registry("moe.adaptation", noun="adaptation method", entry_point="moepipe.adaptation")


class AdaptationConfig(BaseModel):
    """Base of every method's options: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class AdaptResult:
    """What a method hands back.

    Attributes:
        base: the model it was given, unchanged.
        delta: student name -> tensor that replaces the base's, all below ``features.``; the domain's state.
        loss_before: the method's own objective on the support batch before the first step, if it has one.
        loss_after: the same after the last step, if the method computes it.
    """

    base: Student
    delta: Mapping[str, Tensor] = field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None

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

    Args:
        config: options; the defaults when left out.
        task: ``multiclass``, ``binary`` or ``regression``.
    """

    Config: ClassVar[type[AdaptationConfig]] = AdaptationConfig
    needs_teacher: ClassVar[bool] = False

    def __init__(self, config: C | None = None, task: str = "multiclass") -> None:
        self.config: C = config if config is not None else self.Config()  # type: ignore[assignment]
        self.task = task

    @abstractmethod
    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
    ) -> AdaptResult:
        """Adapt to one domain.

        Args:
            model: in evaluation mode; not changed.
            support_images: unlabelled images ``[S, C, H, W]``, S >= 1.
            tokens: their features from ALL experts, ``[S, E, D]`` (nothing is excluded at test time).
            aggregator: in evaluation mode; not changed.
            generator: randomness of methods that draw mini-batches; a fixed seed when left out.

        Raises:
            SpecError: an empty support batch, a teacher is missing, or the method does not fit the model.
        """


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
