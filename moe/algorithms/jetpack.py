"""MoE Jetpack: a mixture of experts recycled from dense checkpoints, and fine-tuned.

Paper: Zhu et al., NeurIPS 2024 (arXiv 2406.04801), sections 3.2 (recycling) and 3.3 (SpheroMoE). Public code: Adlith/
MoE-Jetpack, commit 45214a67. Stages: statistics of the predecessor, recycling (``moe.conversion.recycle``),
fine-tuning by label-smoothed cross-entropy on mixed batches. There is no auxiliary loss: soft slots cannot be
unbalanced.

Known differences from the public code:

- Differs: predictions are deterministic (there noise is added in evaluation too: ``moe.noise_in_eval``).
- Differs: experts that are not recycled start like ``nn.Linear`` (``moe.expert_init``), norms of sparse blocks are
  found in the model and ``lr_mult`` acts (``rates.parity``).
- Parity: everything else; ``parity: official`` switches these three back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe.algorithms._jetpack_presets import PRESETS
from moe.algorithms._jetpack_recipe import RateSpec, ScheduleSpec, rate_groups
from moe.algorithms.base import Algorithm, Group, Settings
from moe.conversion.recycle.options import RecycleOptions
from moe.errors import SpecError
from moe.jet_specs import JetSpec
from moe.jetpack_specs import JetViTSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from moe.adaptation.base import Adaptation
    from moe.batch_mix import Kind
    from moe.conversion.recycle.record import StatisticsRecord
    from moe.conversion.recycle.recycle import Recycled
    from moe.losses import Losses

__all__ = ["PRESETS", "Config", "Method"]


class Config(Settings):
    """All settings of a MoE Jetpack run."""

    model: JetSpec = Field(description="The successor.")
    predecessor: str = Field(
        default="vit_small_patch16_224.augreg_in21k", description="timm name of the network that experts are cut from."
    )
    donor: str | None = Field(
        default="vit_tiny_patch16_224.augreg_in21k",
        description="timm name of the dense network of the successor's width; None: the predecessor is cut to it.",
    )
    recycle: RecycleOptions | None = Field(default=RecycleOptions(), description="How to recycle; None: from scratch.")
    rates: RateSpec = Field(default=RateSpec(), description="Rates and decay by parameter (AdamW).")
    schedule: ScheduleSpec = Field(default=ScheduleSpec(), description="Warm-up and cosine.")
    batch_size: int = Field(ge=1, description="Images per micro-batch over all devices.")
    accumulate: int = Field(default=1, ge=1, le=4096, description="Micro-batches per update.")
    epochs: int = Field(ge=1, description="Passes over the rows.")
    clip: float | None = Field(default=5.0, gt=0, description="Largest gradient norm.")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="Of the targets, soft ones included.")
    mixup: float = Field(default=0.8, ge=0, description="Alpha of mixup; 0: off.")
    cutmix: float = Field(default=1.0, ge=0, description="Alpha of CutMix; 0: off.")
    seed: int = Field(default=3407, ge=0, description="Seed of the released run.")
    parity: Literal["official", "fixed"] = Field(default="fixed", description="official: as in the module's text.")

    @model_validator(mode="after")
    def _sparse(self) -> Config:
        if self.model.moe is None:
            raise ValueError(
                "model.moe is not given, so there is nothing to recycle into; use erm for a dense network."
            )
        return self

    @property
    def network(self) -> JetSpec:
        """The successor with ``parity`` applied."""
        if self.parity == "fixed" or self.model.moe is None:
            return self.model
        moe = self.model.moe.model_copy(update={"noise_in_eval": True, "expert_init": "official"})
        shared = {"shared_options": "official"} if isinstance(self.model, JetViTSpec) else {}
        return self.model.model_copy(update={"moe": moe, **shared})

    @property
    def group_rates(self) -> RateSpec:
        """The rates with ``parity`` applied."""
        return self.rates if self.parity == "fixed" else self.rates.model_copy(update={"parity": "official"})


class Method(Algorithm[Config]):
    """Fine-tuning of a successor; :meth:`recycle` makes its starting weights."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def build(self, num_outputs: int) -> nn.Module:
        """The successor, randomly initialised: a network of timm with layers of slots."""
        from moe.models.jet_networks import build_jet_network

        return build_jet_network(self.config.network, num_outputs)

    def recycle(
        self,
        module: nn.Module,
        predecessor: Mapping[str, Tensor],
        generator: torch.Generator,
        statistics: StatisticsRecord | None = None,
        donor: Mapping[str, Tensor] | None = None,
    ) -> Recycled:
        """Load recycled starting weights into ``module``.

        Args:
            module: what :meth:`build` gave; changed in place.
            predecessor: tensors of the dense network that experts are cut from, by timm's names.
            generator: of the draws.
            statistics: of the predecessor's activations; not needed for ``random``, ``uniform`` and ``copy``.
            donor: tensors of the dense network of the successor's width, if there is one.

        Returns:
            The weights, and which channels and neurons they are.

        Raises:
            SpecError: the configuration says to train from scratch.
            CheckpointError: weights that do not fit.
        """
        from moe.conversion.recycle.recycle import recycle

        if self.config.recycle is None:
            raise SpecError("recycle is None: this configuration trains from scratch.", "Give recycling options.")
        if not isinstance(self.config.model, JetViTSpec):
            raise SpecError("A ConvNeXt is recycled by moe.conversion.recycle.convnext.", "Use its functions.")
        made = recycle(
            predecessor,
            module.state_dict(),
            self.config.recycle,
            generator=generator,
            statistics=statistics,
            donor=donor,
        )
        module.load_state_dict(made.state)
        return made

    def mix(
        self,
        images: Tensor,
        labels: Tensor,
        num_outputs: int,
        numbers: np.random.RandomState,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """A training batch, mixed by mixup or CutMix (either with equal chance where both are on).

        Args:
            images: ``[B, C, H, W]``.
            labels: classes ``[B]``.
            num_outputs: K.
            numbers: source of the choice, of lam and of boxes.
            generator: source of the permutation.

        Returns:
            Images and soft targets ``[B, K]``; smoothing is left to the loss.
        """
        import torch.nn.functional as F

        from moe.batch_mix import apply_mix, choose_kind, draw_mix

        scores = F.one_hot(labels, num_outputs).to(images.dtype)
        alphas: dict[Kind, float] = {"mixup": self.config.mixup, "cutmix": self.config.cutmix}
        kinds = [kind for kind, alpha in alphas.items() if alpha > 0]
        if not kinds:
            return images, scores
        kind = choose_kind(numbers) if len(kinds) == 2 else kinds[0]
        return apply_mix(images, scores, draw_mix(kind, alphas[kind], images.shape, numbers, generator))

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
        """Losses of ``(images [B, C, H, W], classes [B] or soft targets [B, K])``; part ``task``.

        Raises:
            SpecError: the task is not multiclass.
        """
        import torch.nn.functional as F

        from moe.losses import Losses

        if self.task != "multiclass":
            raise SpecError(f"MoE Jetpack trains classifiers of several classes, not {self.task!r}.", "Use erm.")
        images, targets = batch
        value = F.cross_entropy(module(images).float(), targets, label_smoothing=self.config.label_smoothing)
        return Losses(value, {"task": value.detach()})

    def param_groups(self, module: nn.Module) -> list[Group]:
        """Groups by rate and decay (``rates``)."""
        return rate_groups(module, self.config.group_rates)

    def adaptation(self) -> Adaptation[Any]:
        """The method does not adapt."""
        from moe.adaptation.base import make

        return make("none", task=self.task)
