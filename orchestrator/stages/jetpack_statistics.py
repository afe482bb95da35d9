"""``jetpack_statistics``: which channels and neurons of a dense predecessor matter, from one pass over images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.jetpack_settings import StatisticsSettings


class JetpackStatisticsConfig(StageConfig, StatisticsSettings):
    """Whose activations are condensed, over which images."""

    def settings(self) -> StatisticsSettings:
        """The settings alone."""
        return StatisticsSettings(**{name: getattr(self, name) for name in StatisticsSettings.model_fields})


class Stage(StageBase[JetpackStatisticsConfig]):
    """Activation statistics of a dense vision transformer; the shards of a pass are members."""

    output: ClassVar[str] = "jetpack_statistics"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {"data": Port("data", doc="the prepared data set")}
    Config: ClassVar[type[StageConfig]] = JetpackStatisticsConfig

    def members(self, config: JetpackStatisticsConfig) -> list[Member]:
        """One member per shard."""
        if config.shards == 1:
            return [Member("", {"shard": 0})]
        return [Member(f"shard={i}", {"shard": i}) for i in range(config.shards)]

    def external(self, config: JetpackStatisticsConfig, data_root: str) -> Mapping[str, str]:
        """The predecessor's weights, so that a replaced file is measured anew."""
        from workers.packaged_weights import weights_digest

        digest = weights_digest(config.predecessor.name, config.predecessor.pretrained, Path(data_root))
        return {"predecessor": digest} if digest else {}

    def run(self, config: JetpackStatisticsConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``statistics.safetensors``, the sums of this shard."""
        from workers.jetpack_statistics import statistics_member

        return statistics_member(config.settings(), int(member.params["shard"]), context)
