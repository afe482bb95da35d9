"""Which feed-forward networks of a vision transformer are mixtures of experts, in words: a torch-free, frozen record.

``moe.models.surgery`` turns it into modules. Source: GMoE (arXiv 2206.04046), sections 4 and 5 and appendix; public
code Luodian/Generalizable-Mixture-of-Experts, commit 0689d557.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import SpecError
from moe.router_spec import RouterSpec

Kind = Literal["F", "S"]
"""One block: F dense feed-forward network, S sparse mixture of experts."""


class GMoESpec(BaseModel):
    """Which blocks are sparse, and how they route; the defaults are the published GMoE-S/16.

    Differs: ``eval_capacity`` is off, so that a prediction does not depend on the other images of its batch. The public
    code keeps the capacity in evaluation; turn it on to repeat its figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Literal["last_two", "every_two"] | tuple[Kind, ...] = Field(
        default="last_two",
        description="Sparse blocks: the last two of even number (8 and 10 of 12, from 0), every second one (1, 3, "
        "...), or one letter per block, F dense or S sparse.",
    )
    num_experts: int = Field(default=6, ge=1, le=1024, description="Experts E of a sparse block.")
    top_k: int = Field(default=1, ge=1, le=64, description="Experts K per token.")
    gate: Literal["cosine", "linear"] = Field(default="cosine", description="Scores of the experts.")
    projection: int = Field(default=256, ge=1, le=8192, description="Width in which the cosine gate compares.")
    capacity_factor: float | None = Field(
        default=1.5,
        ge=-1024,
        le=1024,
        description="Slots per expert: K * int(factor * ceil(tokens / E)). 0: room for the fullest expert. Negative: "
        "the same, at most that of the absolute value. null drops nothing.",
    )
    eval_capacity: bool = Field(default=False, description="Keep the capacity in evaluation, as the public code does.")
    batch_prioritized: bool = Field(default=True, description="Slots go to the tokens with the highest scores first.")
    gate_noise: float = Field(
        default=1.0, ge=0, le=1024, description="Standard deviation, times E, of what is added to logits in training."
    )
    balance: Literal["load_importance", "gshard", "none"] = Field(
        default="load_importance", description="Auxiliary loss of a sparse block."
    )
    aux_weight: float = Field(default=0.01, ge=0, le=10, description="Weight of each sparse block's auxiliary loss.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout after the experts' activation.")
    drop_path: float = Field(
        default=0.1, ge=0, lt=1, description="Stochastic depth of the last block; grows linearly from 0 in the first."
    )

    @model_validator(mode="after")
    def _fits(self) -> GMoESpec:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}.")
        if not isinstance(self.pattern, str) and "S" not in self.pattern:
            raise ValueError(f"pattern={list(self.pattern)} has no sparse block; leave gmoe out for a dense network.")
        self.router()
        return self

    def router(self) -> RouterSpec:
        """How the tokens of a sparse block find their experts."""
        return RouterSpec(
            gate=self.gate,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            eval_capacity=self.eval_capacity,
            batch_prioritized=self.batch_prioritized,
            noise=self.gate_noise,
            balance=self.balance,
            projection=self.projection,
        )

    def kinds(self, depth: int) -> tuple[Kind, ...]:
        """One letter per block.

        Raises:
            SpecError: a list of another length than ``depth``, or too few blocks for the named pattern.
        """
        if not isinstance(self.pattern, str):
            if len(self.pattern) != depth:
                raise SpecError(f"The pattern names {len(self.pattern)} blocks, the network has {depth}.")
            return self.pattern
        every = self.pattern == "every_two"
        chosen = range(1, depth, 2) if every else range(0, depth, 2)[-2:]
        if len(chosen) < (1 if every else 2):
            raise SpecError(
                f"The pattern {self.pattern!r} does not fit a network of {depth} blocks.", "List them one by one."
            )
        return tuple("S" if i in chosen else "F" for i in range(depth))
