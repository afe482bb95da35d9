"""``split``: divide the training domains at random among the experts (Meta-DMoE, arXiv 2210.03885, section 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages._presets import fill_preset
from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class SplitConfig(StageConfig):
    """Into how many groups, and by which shuffle."""

    preset: str | None = Field(default=None, description="algorithm/dataset/part whose settings to start from")
    groups: int = Field(ge=1, le=100_000, description="number of experts E")
    strategy: Literal["random", "ordered"] = Field(
        default="random", description="random: the paper's shuffle; ordered: neighbouring domain ids stay together"
    )
    seed: int | None = Field(
        default=None, ge=0, description="seed of the shuffle; the official code's split needs its seed here"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values)

    @model_validator(mode="after")
    def _shuffled(self) -> SplitConfig:
        if self.strategy == "ordered" and self.seed is not None:
            raise ValueError(f"seed={self.seed} has no effect on strategy=ordered, which shuffles nothing.")
        return self


class Stage(StageBase[SplitConfig]):
    """Divide the training domains among the experts."""

    output: ClassVar[str] = "groups"
    inputs: ClassVar[Mapping[str, Port]] = {"data": Port("data", doc="the prepared data set")}
    Config: ClassVar[type[StageConfig]] = SplitConfig

    def run(self, config: SplitConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``groups.json``: the domains of every expert."""
        import numpy as np

        from moe.errors import DataError
        from workers.data import read_index
        from workers.sampling import domain_groups

        index = read_index(context.inputs["data"][0])
        column = index.column(index.domain_field, index.splits["train"])
        seed = context.seed if config.seed is None else config.seed
        split = domain_groups(column, config.groups, seed, config.strategy)
        empty = [number for number, domains in enumerate(split.groups) if not domains]
        if empty:
            raise DataError(
                f"There are {len(split.owner)} training domains for {config.groups} experts; experts {empty} get none.",
                f"Set groups to at most {len(split.owner)}.",
            )
        (context.output / "groups.json").write_text(json.dumps(split.groups))
        for number, domains in enumerate(split.groups):
            context.log(f"expert {number}: domains {domains}")
        rows = [int(np.isin(column, domains).sum()) for domains in split.groups]
        return {"groups": split.groups, "sizes": [len(domains) for domains in split.groups], "rows": rows}
