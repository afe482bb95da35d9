"""Meta-DMoE: adapting to domain shift by meta-distillation from a mixture of experts.

Paper: Zhong et al., NeurIPS 2022 (arXiv 2210.03885), equations 1-4, algorithms 1 and 2. Official repository:
n3il666/Meta-DMoE, commit 719de90. Stages: domain split, experts, aggregator pre-training, student pre-training,
meta-training; every setting of each stage is in :class:`Config`, the constants of the public code are in ``PRESETS``.

Known differences from the public code (all numbers of a step are equal, see ``parity``):

- Differs: adaptation at test time is first order (the same numbers without a graph that nobody uses).
- Differs: the query loss before adaptation is computed only when asked for (``parity: official``), without a graph.
- Differs: logged losses are plain means; the public code divides means by the batch size once more.
- Differs: pre-training rates of aggregator and student are settings; there they are function defaults.
- Parity: DenseNet features without the last ReLU (``backbone.last_relu``), Adam moments reset every epoch
  (``meta.reset_optimizer``), support and query may overlap in small domains (a choice of the sampler).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe.algorithms._meta_dmoe_presets import PRESETS
from moe.algorithms._meta_dmoe_stages import STAGE_PRESETS
from moe.algorithms.base import Algorithm, Group, Settings, TrainPhase
from moe.specs import BackboneSpec, MetaStepSpec, StudentMoESpec

if TYPE_CHECKING:
    from torch import nn

    from moe.adaptation.base import Adaptation
    from moe.aggregator import Aggregator
    from moe.losses import Losses
    from moe.meta_step import Episode, EpisodeModule

__all__ = ["PRESETS", "STAGE_PRESETS", "AggregatorSpec", "Config", "MetaPhase", "Method"]


class AggregatorSpec(Settings):
    """Shape of the aggregator; its width is the features'."""

    depth: int = Field(default=1, ge=1, le=48, description="Encoder layers.")
    heads: int = Field(default=16, ge=1, le=256, description="Attention heads; must divide the feature width.")
    mlp_ratio: float = Field(default=2.0, gt=0, le=16, description="Feed-forward width as a multiple of the features'.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout in pre-training; never in meta-training.")
    pool: Literal["mean", "max"] = Field(default="mean", description="Pooling over the experts' tokens.")


class MetaPhase(Settings):
    """Meta-training: episodes, the step, and the two optimisers."""

    support: int = Field(ge=1, description="Unlabelled images of an episode; also the batch size of evaluation.")
    query: int = Field(ge=1, description="Labelled images of an episode.")
    epochs: int | None = Field(default=None, ge=1, description="Of floor(rows / (support + query)) episodes each.")
    steps: int | None = Field(default=None, ge=1, description="Episodes in total; instead of epochs.")
    step: MetaStepSpec = Field(description="Inner step, order, exclusion.")
    student_lr: float = Field(gt=0, description="Outer rate beta_s of student and head (Adam).")
    aggregator_lr: float = Field(gt=0, description="Outer rate beta_t of the aggregator (Adam).")
    rates_lr: float = Field(default=1e-3, gt=0, description="Outer rate of learned inner rates (Adam).")
    weight_decay: float = Field(default=0.0, ge=0, description="Of student and aggregator, not of learned rates.")
    schedule: Literal["exponential", "cosine", "constant"] = Field(
        default="exponential",
        description="exponential: both rates, per epoch. cosine: the student's rate only, with warm-up.",
    )
    decay: float = Field(default=0.96, gt=0, le=1, description="Factor per epoch of the exponential schedule.")
    warmup_epochs: int = Field(default=1, ge=0, description="Warm-up of the cosine schedule.")
    reset_optimizer: bool = Field(
        default=True, description="Make new optimisers every epoch. Parity: all public runs but rxrx1 do."
    )

    @model_validator(mode="after")
    def _length(self) -> MetaPhase:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class Config(Settings):
    """All settings of a Meta-DMoE run."""

    backbone: BackboneSpec = Field(description="Network of experts and student.")
    num_experts: int = Field(ge=1, le=1024, description="Groups E that the source domains are split into.")
    seed: int = Field(default=0, ge=0, description="Seed of the released run.")
    expert: TrainPhase = Field(description="Training of each expert on its group.")
    aggregator: AggregatorSpec = Field(default_factory=AggregatorSpec, description="Shape of the aggregator.")
    aggregator_training: TrainPhase = Field(description="Pre-training of the aggregator as a classifier.")
    student: TrainPhase = Field(description="Pre-training of the student on all rows.")
    moe: StudentMoESpec | None = Field(default=None, description="MoE block of the student, or none (the paper's).")
    meta: MetaPhase = Field(description="Meta-training.")
    parity: Literal["official", "fixed"] = Field(
        default="fixed", description="official repeats side computations of the public code (loss before adaptation)."
    )
    shared_start: bool = Field(
        default=False, description="Experts and student start from one ERM model instead of the backbone's weights."
    )

    @property
    def step(self) -> MetaStepSpec:
        """The meta step with ``parity`` applied."""
        return self.meta.step.model_copy(update={"loss_before": True}) if self.parity == "official" else self.meta.step


class Method(Algorithm[Config]):
    """Meta-training; the supervised stages before it use the ``TrainPhase`` blocks of the settings."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def build(self, num_outputs: int) -> nn.Module:
        """Student and aggregator in one :class:`moe.meta_step.EpisodeModule`."""
        from moe.backbones import build_student
        from moe.meta_step import EpisodeModule

        student = build_student(self.config.backbone, num_outputs, self.config.moe)
        aggregator = self.build_aggregator(student.feature_dim, num_outputs)
        return EpisodeModule(student, aggregator, self.config.step, self.task)

    def build_aggregator(self, feature_dim: int, num_outputs: int) -> Aggregator:
        """The aggregator alone, for its pre-training (SpecError when the heads do not divide the width)."""
        from moe.aggregator import Aggregator

        return Aggregator(feature_dim, num_outputs, **self.config.aggregator.model_dump())

    def loss(self, module: nn.Module, batch: Episode) -> Losses:
        """Losses of one episode."""
        losses: Losses = module(batch)
        return losses

    def param_groups(self, module: nn.Module) -> list[Group]:
        """Groups ``student`` (features, MoE block, head), ``aggregator`` and, when learned, ``rates``."""
        from typing import cast

        meta, episode = self.config.meta, cast("EpisodeModule", module)
        groups = [
            Group("student", _trainable(episode.student), meta.student_lr, meta.weight_decay),
            Group("aggregator", _trainable(episode.aggregator), meta.aggregator_lr, meta.weight_decay),
        ]
        if episode.rates is not None:
            groups.append(Group("rates", _trainable(episode.rates), meta.rates_lr))
        return groups

    def adaptation(self, rates: Mapping[str, float] | None = None) -> Adaptation[Any]:
        """``distill`` with the inner step of meta-training; ``rates`` are learned ones (``InnerRates.values``)."""
        from moe.adaptation.base import make

        step = self.config.step
        options = {
            "inner_lr": step.inner_lr,
            "steps": step.inner_steps,
            "adapt": step.adapt,
            "rates": dict(rates or {}),
        }
        return make("distill", options, self.task)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
