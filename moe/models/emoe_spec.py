"""How a dense feed-forward layer becomes emergent experts, in words: a torch-free, frozen record.

``moe.models.emoe_blocks`` turns it into modules. Source: EMoE (arXiv 2310.10908) and its public code; fields name the
public flags they stand for.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.router_spec import RouterSpec


class EMoESpec(BaseModel):
    """Experts, gate and rules of a converted layer.

    Differs: nothing is dropped, evaluation is independent of the batch, and dropout stays where the dense layer has it.
    :meth:`official` is the public code: capacity 1.5 in training and evaluation, first come by best score, dropout
    inside the experts and none behind GPT-2's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_experts: int = Field(default=64, ge=1, le=8192, description="Experts E; must divide the layer's neurons.")
    top_k: int = Field(default=16, ge=1, le=8192, description="Experts K per token; at most E.")
    gate: Literal["avg_k", "avg_k_bias", "cosine", "linear"] = Field(
        default="avg_k",
        description="avg_k: mean keys of the experts, never trained (EMoE). avg_k_bias: with the neurons' mean bias "
        "(ours). cosine: learned (EMoE-learn). linear: learned, starts from the mean keys.",
    )
    projection: int = Field(default=256, ge=1, le=65536, description="Cosine gate: width of its codebook.")
    one_score: bool | None = Field(
        default=None, description="Chosen experts weigh 1; with avg-k gates when left out. Else renormalised softmax."
    )
    choice: Literal["top", "not_top", "bottom"] = Field(
        default="top", description="Ablations: the E-K experts that fit worst, or the K that do. Avg-k gates only."
    )
    split: Literal["balanced", "contiguous", "random", "coactivation", "copy"] = Field(
        default="balanced", description="How neurons are grouped; copy: every expert is the whole layer."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split.")
    restarts: int = Field(default=10, ge=1, le=1000, description="Starts of balanced k-means.")
    expert_repeat: int = Field(default=1, ge=1, le=8192, description="Clusters per expert; parameters grow as much.")
    select: Literal["gate", "up", "up_abs", "inter", "inter_abs"] = Field(
        default="gate", description="SwiGLU layers: whose block mean is the score of an expert."
    )
    aux_weight: float = Field(default=0.01, ge=0, le=10, description="Weight of each layer's balance loss.")
    gate_noise: float = Field(
        default=1.0, ge=0, le=1024, description="Training noise on logits, times E. 0 leaves the balance loss out."
    )
    capacity_factor: float | None = Field(
        default=None, ge=-1024, le=1024, description="Seats per expert, times an equal share. null drops nothing."
    )
    eval_capacity: bool = Field(default=False, description="Capacity in evaluation, too.")
    batch_prioritized: bool = Field(default=True, description="With a capacity: best scores are seated first.")
    gate_momentum: float = Field(
        default=0.0, ge=0, le=1, description="one_score_gate_update_momentum: share of the old avg-k gate."
    )
    normalize_gate: bool = Field(
        default=False, description="normalize_one_score_gate: unit tokens and unit rows in the avg-k gate."
    )
    value_norm_weighted: bool = Field(default=False, description="Mean keys weighted by the norms of their values.")
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Dropout inside the experts; the dense layer's own when left out."
    )
    dropout_first: bool = Field(default=False, description="Drop before the activation, not behind it.")
    output_dropout: bool = Field(default=True, description="Keep the dropout behind GPT-2's and timm's layer.")
    keep_dense: bool = Field(
        default=False, description="Keep the dead dense weights of BERT in the state, as the public code does."
    )
    kernel: str = Field(default="auto", description="How experts are computed, see moe.layers.kernels.")

    @model_validator(mode="after")
    def _fits(self) -> EMoESpec:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}.")
        if self.expert_repeat > self.num_experts:
            raise ValueError(f"expert_repeat={self.expert_repeat} is more than num_experts={self.num_experts}.")
        if self.choice != "top" and not self.is_avg_k:
            raise ValueError(f"choice={self.choice} is an ablation of the avg-k gates, not of gate={self.gate}.")
        if self.choice == "not_top" and self.top_k == self.num_experts:
            raise ValueError("choice=not_top with top_k equal to num_experts leaves no expert.")
        if self.is_avg_k and self.one_score is False:
            raise ValueError(f"gate={self.gate} is not trained, so its scores cannot be weights: leave one_score out.")
        if self.expert_repeat > 1 and self.split == "copy":
            raise ValueError("split=copy already gives every expert all neurons: leave expert_repeat out.")
        if self.normalize_gate and self.gate not in ("avg_k", "linear"):
            raise ValueError(f"normalize_gate has no meaning for gate={self.gate}.")
        if self.gate_momentum and not self.is_avg_k:
            raise ValueError(f"gate_momentum has no meaning for gate={self.gate}, which is learned.")
        if self.value_norm_weighted and self.gate == "cosine":
            raise ValueError("value_norm_weighted has no meaning for gate=cosine, which does not look at the keys.")
        self.router()
        return self

    @property
    def is_avg_k(self) -> bool:
        """Whether the gate is the experts' mean keys."""
        return self.gate in ("avg_k", "avg_k_bias")

    @property
    def chosen(self) -> int:
        """Experts that a token visits."""
        return self.num_experts - self.top_k if self.choice == "not_top" else self.top_k

    def router(self) -> RouterSpec:
        """The routing rule."""
        one_score = self.is_avg_k if self.one_score is None else self.one_score
        capped = self.capacity_factor is not None
        return RouterSpec(
            gate="avg_k" if self.gate == "avg_k_bias" else self.gate,
            top_k=self.chosen,
            one_score=one_score,
            capacity_factor=self.capacity_factor,
            eval_capacity=self.eval_capacity,
            batch_prioritized=self.batch_prioritized and capped,
            noise=self.gate_noise,
            balance="load_importance" if self.gate_noise > 0 else "none",
            normalize_input=self.normalize_gate,
            projection=self.projection,
        )

    @classmethod
    def official(cls, **changes: Any) -> EMoESpec:
        """The public code's rules, with ``changes``."""
        rules: dict[str, Any] = {"capacity_factor": 1.5, "eval_capacity": True, "dropout": 0.1, "dropout_first": True}
        return cls(**{**rules, "output_dropout": False, "keep_dense": True, **changes})
