"""``jetpack_recycle``: the starting weights of a SpheroMoE network and of its baselines, one member for each start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.jetpack_settings import RecycleSettings, Start, fill_jetpack_preset


class JetpackRecycleConfig(StageConfig, RecycleSettings):
    """The successor, what it is cut from, and the ways to start."""

    preset: str | None = Field(
        default=None, description="data set of the paper (cifar100, pets-paper, ...) whose successor to start from"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_jetpack_preset(values, RecycleSettings.model_fields)

    def settings(self) -> RecycleSettings:
        """The settings without what only the stage knows."""
        return RecycleSettings(**{name: getattr(self, name) for name in RecycleSettings.model_fields})


class Stage(StageBase[JetpackRecycleConfig]):
    """Recycle a dense network into starting weights, by each strategy; random weights and baselines beside it."""

    output: ClassVar[str] = "jetpack_start"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set, for its classes"),
        "statistics": Port(
            "jetpack_statistics", many=True, optional=True, doc="all shards; not needed for random and uniform choices"
        ),
    }
    Config: ClassVar[type[StageConfig]] = JetpackRecycleConfig

    def members(self, config: JetpackRecycleConfig) -> list[Member]:
        """One member per start."""
        return [
            Member(f"start={name}", {"name": name, "start": start.model_dump(mode="json")})
            for name, start in config.starts.items()
        ]

    def external(self, config: JetpackRecycleConfig, data_root: str) -> Mapping[str, str]:
        """The weights of predecessor and donor, and the released files that starts name."""
        from workers.packaged_weights import weights_digest

        found = {}
        for what, spec in (("predecessor", config.predecessor), ("donor", config.donor)):
            if spec is not None and (digest := weights_digest(spec.name, spec.pretrained, Path(data_root))):
                found[what] = digest
        files = {start.weights for start in config.starts.values() if start.weights is not None}
        return found | {f"weights/{file}": weights_digest("file", file, Path(data_root)) for file in sorted(files)}

    def run(self, config: JetpackRecycleConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``model.safetensors``; ``meta`` says what came from where."""
        from workers.jetpack_recycle import recycle_member

        start = Start(**member.params["start"])
        return recycle_member(config.settings(), str(member.params["name"]), start, context)
