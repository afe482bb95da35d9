"""How a student module's loss weighs label and teacher: a torch-free, frozen record."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class KDSpec(BaseModel):
    """Settings of ``moe.conversion.teaching.kd_loss``; the defaults are m2mKD's (arXiv 2402.16918, public code)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["soft", "hard", "none"] = Field(
        default="soft", description="soft: KL to the teacher's softened logits. hard: its best class. none: label only."
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="Weight of the teacher's term; the label has 1 - alpha.")
    tau: float = Field(default=1.0, gt=0, le=1000, description="Temperature of the soft term.")
    reduction: Literal["official", "batchmean"] = Field(
        default="official",
        description="official divides the KL sum by batch x classes, batchmean by the batch (the usual distillation).",
    )
