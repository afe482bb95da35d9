"""Options of checkpoint recycling: torch-free, frozen records that YAML, artifacts and workers share.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2, and its public code. The default of every field is what the public
code did for its released models; the other values are alternatives, or corrections of what that code got wrong.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Metric = Literal["L1", "L2", "act_patrn", "co_act"]
Selection = Literal["L1", "L2", "act_patrn", "random", "uniform", "co_act", "copy"]
Averaging = Literal["groups", "batch_sum", "positions"]
EdgeWeights = Literal["none", "truncated", "scaled"]


class StatisticsOptions(BaseModel):
    """How activations are condensed into one number per channel (or pair of channels)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: tuple[Metric, ...] = Field(
        default=("L1", "L2", "act_patrn"),
        min_length=1,
        description="Which statistics; co_act (d x d per layer) is only worth its cost for graph selection.",
    )
    averaging: Averaging = Field(
        default="groups",
        description="groups: sums per batch, averaged inside groups of `group` batches, then over the groups (released "
        "tool). batch_sum: per batch divided by its positions, summed over batches (simplified tool). positions: true "
        "averages over all positions, whatever the batches.",
    )
    group: int = Field(default=256, ge=1, le=1_000_000, description="Batches per group of the averaging `groups`.")
    threshold: Literal["fixed", "percentile", "mean_std"] = Field(
        default="fixed",
        description="What counts as active. fixed: above `value`; percentile: above that percentile of the layer's "
        "values in the batch; mean_std: above their mean plus their standard deviation.",
    )
    value: float = Field(default=0.0, description="Threshold of `fixed`.")
    percentile: float = Field(default=90.0, ge=0, le=100, description="Percentile of `percentile`.")

    @model_validator(mode="after")
    def _one_threshold(self) -> StatisticsOptions:
        if self.threshold != "fixed" and self.value != 0.0:
            raise ValueError(f"value={self.value} has no meaning for threshold={self.threshold!r}; it is for 'fixed'.")
        return self


class GraphOptions(BaseModel):
    """How the co-activation graph of a layer is partitioned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["metis", "louvain", "spectral"] = Field(default="metis", description="Partitioner.")
    parts: int = Field(default=32, ge=1, le=65_536, description="Parts of METIS and clusters of spectral.")
    resolution: float = Field(default=1.05, gt=0, le=100, description="Resolution of Louvain: more makes more parts.")
    weights: EdgeWeights = Field(
        default="none",
        description="Edge weights that METIS sees. none: every pair that was ever active together counts alike "
        "(released tool); truncated: the co-activation cut to an integer (simplified tool); scaled: spread over METIS' "
        "integers, at least 1.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="Seed of Louvain (default 42, as released) and spectral (default 0)."
    )
    trials: int = Field(default=100, ge=1, le=10_000, description="k-means starts of spectral.")


class RecycleOptions(BaseModel):
    """How a predecessor becomes a successor. The successor's own tensors say how many experts of which size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    select: Selection = Field(
        default="L2",
        description="How channels and neurons are chosen. L1, L2, act_patrn: drawn in proportion to that statistic; "
        "random; uniform: evenly spaced; co_act: whole parts of the co-activation graph; copy: everything, which "
        "needs equal sizes (sparse upcycling).",
    )
    channels: Literal["per_expert", "shared_topk"] = Field(
        default="per_expert",
        description="per_expert: every expert draws its own channels (released tool); shared_topk: one list for all "
        "experts and layers, the channels with the largest statistic (paper).",
    )
    rounding: Literal["round", "truncate", "floor"] = Field(
        default="round",
        description="Evenly spaced lists. round: linspace rounded half to even (released tool); truncate: linspace "
        "truncated (simplified tool); floor: floor(i * d / k) (paper).",
    )
    graph: GraphOptions = Field(default=GraphOptions(), description="Partitioner of select=co_act.")
    depth: Literal["first", "even"] = Field(
        default="first",
        description="Which predecessor layers feed a shallower successor: the first ones or evenly spaced ones.",
    )
    inherit_norms: bool = Field(
        default=False,
        description="Corrected start: slot_norm takes norm2's values and fc_norm those of the final norm, instead of "
        "staying fresh.",
    )

    @model_validator(mode="after")
    def _fits(self) -> RecycleOptions:
        if self.channels == "shared_topk" and self.select in ("random", "uniform", "copy"):
            raise ValueError(f"channels='shared_topk' needs a statistic, but select={self.select!r} uses none.")
        if self.rounding != "round" and self.select != "uniform":
            raise ValueError(f"rounding={self.rounding!r} has no meaning for select={self.select!r}.")
        return self
