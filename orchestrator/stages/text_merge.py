"""``text_merge``: the chosen network as an ordinary dense one with its tokenizer, for serving elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class TextMergeConfig(StageConfig):
    """Whose selected run is merged."""

    method: str = Field(default="emoe", description="method of the search")
    tuning: Literal["full", "lora"] = Field(default="full", description="kind of tuning")
    seed: int | None = Field(default=None, ge=0, description="run of this seed; the best by selection score when null")
    merge_bias: Literal["uniform", "usage"] | None = Field(
        default=None, description="how merging averages the experts' shares of the output bias; null: as evaluated"
    )


class Stage(StageBase[TextMergeConfig]):
    """Experts put back, adapters folded in: a Hugging Face folder."""

    output: ClassVar[str] = "text_merged"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {
        "tokens": Port("tokens", doc="for its tokenizer"),
        "models": Port("text_model", many=True, doc="every run of the search"),
        "evaluations": Port("text_evaluation", many=True, doc="which runs were selected"),
    }
    Config: ClassVar[type[StageConfig]] = TextMergeConfig

    def run(self, config: TextMergeConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``model/`` (config, safetensors, tokenizer); ``meta`` has the residual of the merge."""
        from workers.text_merge import merge_member

        return merge_member(config.method, config.tuning, config.seed, config.merge_bias, context)
