"""The algorithm contract: what to build, what to minimise, how to predict and how to adapt.

One algorithm is one file ``moe/algorithms/<name>.py`` with a class ``Method`` derived from :class:`Algorithm`, a nested
frozen ``Config`` and ``PRESETS`` by data set. No loop, optimiser or file is in here; stages take the settings of a
preset and drive the parts. Importing an algorithm does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import SpecError, nearest
from moe.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.adaptation.base import Adaptation
    from moe.losses import Losses

ALGORITHMS = Registry("moe.algorithms", noun="algorithm", entry_point="moepipe.algorithms")


class Settings(BaseModel):
    """Base of every configuration block: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainPhase(Settings):
    """How a supervised stage trains; field names are those of ``workers.settings.TrainSettings``."""

    batch_size: int = Field(ge=1, description="Images per update.")
    epochs: int | None = Field(default=None, ge=1, description="Passes over the rows.")
    steps: int | None = Field(default=None, ge=1, description="Updates; instead of epochs.")
    lr: float = Field(gt=0, description="Base learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 (Adam) or decoupled (AdamW).")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(default="adam", description="Optimiser.")
    schedule: Literal["exponential", "cosine", "constant", "onecycle"] = Field(
        default="exponential", description="exponential: factor per epoch; cosine: with warm-up, per update."
    )
    decay: float = Field(default=0.96, gt=0, le=1, description="Factor per epoch of the exponential schedule.")
    warmup_epochs: int = Field(default=10, ge=0, description="Warm-up of the cosine schedule.")
    clip: float | None = Field(default=None, gt=0, description="Largest gradient norm.")

    @model_validator(mode="after")
    def _length(self) -> TrainPhase:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class Group(NamedTuple):
    """Parameters that share a learning rate."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float = 0.0


C = TypeVar("C", bound=Settings)
R = TypeVar("R")


class WeightAverage(ABC):
    """Weights averaged along training, which are evaluated and kept in place of the last ones.

    It has no loop: whoever trains calls :meth:`update` after every update, :meth:`observe` after every evaluation on
    validation rows, and evaluates :meth:`average`. Weights are the tensors of a module's state dict by name.

    Class attributes:
        observes: it needs the validation loss of the trained weights themselves.
    """

    observes: ClassVar[bool] = False

    @abstractmethod
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after update ``step`` (from 0)."""

    def observe(self, loss: float) -> bool:
        """Take in the validation loss after the latest update; True when further training cannot change the average."""
        return False

    @abstractmethod
    def average(self) -> dict[str, Tensor]:
        """The averaged weights (SpecError before the first update)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; tensors, numbers, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""


class Algorithm(ABC, Generic[C]):
    """Base class of the algorithms.

    Class attributes:
        Config: all settings.
        PRESETS: data set -> fields of ``Config``; each names its source in a comment.

    Args:
        config: the settings.
        task: ``multiclass``, ``binary`` or ``regression``.
    """

    Config: ClassVar[type[Settings]] = Settings
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: C, task: str = "multiclass") -> None:
        self.config = config
        self.task = task

    @classmethod
    def preset(cls, dataset: str, **changes: Any) -> C:
        """Settings for ``dataset``; top-level fields may be replaced by ``changes``.

        Raises:
            SpecError: there is no preset for it.
            pydantic.ValidationError: changes that do not fit.
        """
        if dataset not in cls.PRESETS:
            raise SpecError(f"There is no preset for the data set {dataset!r}.", nearest(dataset, cls.PRESETS))
        config: C = cls.Config(**{**cls.PRESETS[dataset], **changes})  # type: ignore[assignment]
        return config

    @abstractmethod
    def build(self, num_outputs: int) -> nn.Module:
        """The module that an engine trains, randomly initialised from torch's global generator."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any) -> Losses:
        """Losses of one batch."""

    def loss_at(self, module: nn.Module, batch: Any, step: int) -> Losses:
        """Losses of one batch in update ``step`` (from 0), for those that change while training; else :meth:`loss`."""
        return self.loss(module, batch)

    def update(self, module: nn.Module, batch: Any, take_step: Callable[[Any], R]) -> R:
        """Make one update out of engine steps; by default one step on the whole batch.

        Args:
            module: what is trained; an algorithm may move its weights in place before and after the steps.
            batch: everything that one update sees.
            take_step: the engine's step on (a part of) the batch: loss, gradient, clipping, optimiser.

        Returns:
            What the last engine step returned.
        """
        return take_step(batch)

    def restarts_optimizer(self, step: int) -> bool:
        """Whether the optimiser's moments are dropped before update ``step`` (from 0)."""
        return False

    def averaging(self) -> WeightAverage | None:
        """A new weight average, or None when the trained weights themselves are kept."""
        return None

    @abstractmethod
    def param_groups(self, module: nn.Module) -> list[Group]:
        """The trainable parameters by learning rate."""

    @abstractmethod
    def adaptation(self) -> Adaptation[Any]:
        """The method's own test-time adaptation."""

    def predict(self, module: nn.Module, images: Tensor) -> Tensor:
        """Predictions ``[B]`` of a classifier or student for images ``[B, C, H, W]``, without gradients."""
        import torch

        from moe.losses import predict

        with torch.no_grad():
            return predict(self.task, module(images))


def algorithm(name: str) -> type[Algorithm[Any]]:
    """The class of the algorithm ``name`` (SpecError when unknown)."""
    method: type[Algorithm[Any]] = ALGORITHMS.load(name).Method
    return method
