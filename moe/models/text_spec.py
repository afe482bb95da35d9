"""Text models and how they are tuned, in words: torch-free, frozen records.

``moe.models.text`` and ``moe.models.emoe_tuning`` turn them into modules. Sources: BERT (arXiv 1810.04805), GPT-2,
LLaMA (2302.13971), LoRA (2106.09685); flags of the public code of EMoE (2310.10908).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["bert", "gpt2", "llama"]


class TextModelSpec(BaseModel):
    """A text classifier (or regressor, with one output); the defaults are BERT-base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family = Field(description="Architecture.")
    num_outputs: int = Field(default=2, ge=1, le=100000, description="Classes; 1 is regression.")
    hidden: int = Field(default=768, ge=1, le=65536, description="Width D.")
    layers: int = Field(default=12, ge=1, le=1024, description="Transformer layers.")
    heads: int = Field(default=12, ge=1, le=1024, description="Attention heads; must divide the width.")
    ffn: int = Field(default=3072, ge=1, le=262144, description="Neurons F of a feed-forward layer.")
    vocabulary: int = Field(default=30522, ge=1, description="Tokens.")
    positions: int = Field(default=512, ge=1, description="Longest text in tokens.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="All dropouts of BERT and GPT-2.")
    pad_token: int = Field(default=0, ge=0, description="Padding token; GPT-2 uses its end-of-text token.")

    @model_validator(mode="after")
    def _fits(self) -> TextModelSpec:
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}.")
        return self


class LoraSpec(BaseModel):
    """Low-rank adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=8, ge=1, le=4096, description="Rank r.")
    alpha: int = Field(default=16, ge=1, le=65536, description="Scale alpha; the update counts alpha / r.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout of the adapters' input.")
    targets: tuple[str, ...] = Field(
        default=(),
        description="Linear layers that get one; by family when left out: query, value; c_attn; q_proj, v_proj.",
    )


class TuningRules(BaseModel):
    """Which parameters train: flags of a run, by their public names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora: bool = Field(
        default=False, description="Low-rank adapters; without freezing flags only they and the head train."
    )
    moe_layers: tuple[int, ...] = Field(
        default=(), description="Layers that are converted, or that the flags refer to."
    )
    one_score: bool = Field(default=False, description="The gate is the experts' mean keys.")
    freeze: tuple[str, ...] = Field(default=(), description="Parts of names that freeze a parameter.")
    freeze_layer: tuple[int, ...] = Field(default=(), description="Layers that are frozen.")
    tune_moe_layers_only: bool = Field(default=False, description="Freeze embeddings and all layers but moe_layers.")
    tune_gates_only: bool = Field(default=False, description="Within moe_layers, train learned gates only.")
    tune_layernorm: bool = Field(default=False, description="Within moe_layers, train norms as well.")
    fair: bool = Field(default=False, description="Equal conditions for all methods instead of the public rules.")

    @property
    def decides_anew(self) -> bool:
        """Whether a flag replaces the starting point."""
        return bool(self.freeze or self.freeze_layer or self.tune_moe_layers_only)
