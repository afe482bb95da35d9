"""How tokens find their experts, in words: a torch-free, frozen record that models and conversions share.

``moe.layers.router`` turns it into a module.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RouterSpec(BaseModel):
    """How tokens find their experts (``moe.layers.router``): gate, choice, weights, capacity, balance loss.

    The gates come in two families. ``linear``, ``cosine`` and ``avg_k`` (Tutel: GMoE, EMoE) take the K best softmax
    probabilities, weigh by them and give seats rank by rank. ``naive``, ``noisy``, ``gshard`` and ``switch`` (fastmoe:
    m2mKD) weigh by a softmax over the chosen logits (switch: by the probability) and give seats token by token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gate: Literal["linear", "cosine", "avg_k", "naive", "noisy", "gshard", "switch"] = Field(
        default="linear", description="avg_k: the mean keys of the experts, never trained. See the class for the rest."
    )
    top_k: int = Field(default=1, ge=1, le=1024, description="Experts K per token.")
    capacity_factor: float | None = Field(
        default=None,
        ge=-1024,
        le=1024,
        description="Seats per expert while training, times an equal share. None drops nothing. Tutel's gates: 0 makes "
        "room for the fullest expert, a negative number does so up to its absolute value.",
    )
    eval_capacity: bool = Field(
        default=False,
        description="Apply capacity in evaluation too, as the official code does; then a token's result depends on the "
        "others in its batch.",
    )
    eval_capacity_factor: float | None = Field(
        default=None, ge=-1024, le=1024, description="Factor in evaluation; capacity_factor when left out."
    )
    alignment: int = Field(default=1, ge=1, le=4096, description="Round the seats per expert up to a multiple of this.")
    official_load: bool = Field(
        default=False,
        description="With batch priority and a factor of 0 or below, size the seats by the official count, which "
        "misses most of the load.",
    )
    batch_prioritized: bool = Field(
        default=False, description="Tokens with the highest best score sit first; else token order."
    )
    normalize_gates: bool = Field(
        default=True, description="With K > 1, scale the K probabilities to sum 1 (before any is dropped)."
    )
    one_score: bool = Field(default=False, description="Every chosen expert weighs exactly 1 (EMoE).")
    pre_score: bool = Field(default=False, description="Weigh the expert's input instead of its output.")
    noise: float = Field(
        default=0.0, ge=0, le=1024, description="Standard deviation of the training noise on logits, times E."
    )
    balance: Literal["none", "gshard", "load_importance", "switch", "noisy"] = Field(
        default="none", description="Auxiliary loss, not weighted here."
    )
    normalize_input: bool = Field(default=False, description="Linear gates: scale tokens to unit length first.")
    projection: int = Field(default=256, ge=1, le=65536, description="Cosine gate: width of the codebook.")
    temperature: float = Field(default=0.5, gt=0, le=1024, description="Cosine gate: initial temperature.")
    max_scale: float = Field(default=100.0, gt=0, le=1e6, description="Cosine gate: largest inverse temperature.")
    noise_epsilon: float = Field(default=1e-2, gt=0, le=1024, description="Noisy gate: smallest standard deviation.")
    switch_eps: float = Field(
        default=0.1, ge=0, le=1024, description="Switch gate: half width of the additive training noise around 1."
    )
    random_routing: bool = Field(
        default=False,
        description="GShard gate: the second expert is skipped at random, more often the less it weighs. In evaluation "
        "only together with eval_capacity.",
    )

    @model_validator(mode="after")
    def _fits(self) -> RouterSpec:
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        gate, tutel = self.gate, self.gate in ("linear", "cosine", "avg_k")
        capped = self.capacity_factor is not None
        negative = min(self.capacity_factor or 0.0, self.eval_capacity_factor or 0.0) < 0
        needs = {"switch": "switch", "noisy": "noisy"}.get(self.balance, gate)
        return [
            (gate == "gshard" and self.top_k != 2, f"The gshard gate chooses 2 experts, not top_k={self.top_k}."),
            (gate == "switch" and self.top_k != 1, f"The switch gate chooses 1 expert, not top_k={self.top_k}."),
            (gate == "avg_k" and not self.one_score, "The avg_k gate is not trained: set one_score to true."),
            (gate in ("naive", "noisy") and capped, f"The {gate} gate has no capacity: leave capacity_factor out."),
            (self.one_score and not tutel, f"one_score=true has no meaning for the {gate} gate."),
            (self.one_score and self.pre_score, "pre_score=true has no effect with one_score=true: leave one out."),
            (self.eval_capacity and not capped, "eval_capacity=true needs a capacity_factor."),
            (
                self.eval_capacity_factor is not None and not self.eval_capacity,
                "eval_capacity_factor is used with eval_capacity=true only.",
            ),
            (self.alignment > 1 and not (capped and tutel), f"alignment={self.alignment} needs a capacity_factor."),
            (negative and not tutel, f"The {gate} gate needs a capacity_factor of 0 or more."),
            (self.batch_prioritized and not tutel, f"The {gate} gate seats tokens in order: no batch_prioritized."),
            (self.noise > 0 and not tutel, f"noise={self.noise} has no meaning for the {gate} gate."),
            (self.random_routing and gate != "gshard", f"random_routing has no meaning for the {gate} gate."),
            (self.normalize_input and gate not in ("linear", "avg_k"), f"The {gate} gate has no normalize_input."),
            (
                self.balance == "load_importance" and not (tutel and self.noise > 0),
                "The load_importance loss needs a linear, cosine or avg_k gate with noise above 0 "
                f"(gate={gate}, noise={self.noise}).",
            ),
            (needs != gate, f"The {self.balance} loss belongs to the {needs} gate, not to {gate}."),
        ]
