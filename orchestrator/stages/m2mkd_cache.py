"""``m2mkd_cache``: what the frozen meta model and the teacher's modules say about every row, once for all students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.stages._m2mkd import MethodConfig
from orchestrator.stages.base import Member, Port, StageBase
from workers.context import Context


class M2mkdCacheConfig(MethodConfig):
    """Which rows, and how they are stored."""

    splits: tuple[str, ...] = Field(
        default=("train", "val"), min_length=1, description="splits that are stored; those of training and validation"
    )
    dtype: Literal["float32", "float16"] = Field(default="float32", description="float16 halves the file")
    batch_size: int = Field(default=128, ge=1, description="images per forward pass; moves the last bits")


class Stage(StageBase[M2mkdCacheConfig]):
    """Tokens that enter every position of the meta model, and the teacher hybrids' logits."""

    output: ClassVar[str] = "m2mkd_cache"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "meta": Port("m2mkd_network", doc="the meta model of phase pt"),
        "teacher": Port("m2mkd_network", doc="the whole teacher of phase ft"),
    }
    Config: ClassVar[type[M2mkdCacheConfig]] = M2mkdCacheConfig

    def members(self, config: M2mkdCacheConfig) -> list[Member]:
        """One member."""
        return [config.member("cache")]

    def run(self, config: M2mkdCacheConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``features.npy``, which students map into memory."""
        from workers.m2mkd_teach import cache_member

        return cache_member(config.method, config.splits, config.dtype, config.batch_size, context)
