"""``prepare``: open a data set, check it, and record its rows as a ``data`` artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from moe.errors import SpecError
from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.datasets.base import DATASETS


class PrepareConfig(StageConfig):
    """Which data set, and what was chosen about it."""

    dataset: str = Field(description="registry name; `moepipe ls datasets` lists them")
    options: dict[str, Any] = Field(default_factory=dict, description="the data set's own options, e.g. target")

    @model_validator(mode="after")
    def _known(self) -> PrepareConfig:
        from workers.data import parse_options

        try:
            parse_options(self.dataset, self.options)
        except SpecError as error:  # pydantic adds the field's place to a ValueError only
            raise ValueError(str(error)) from None
        return self


class Stage(StageBase[PrepareConfig]):
    """Open a data set, check it, and record its rows."""

    output: ClassVar[str] = "data"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {}
    Config: ClassVar[type[StageConfig]] = PrepareConfig

    def code(self, config: PrepareConfig) -> list[str]:
        """The data set's module."""
        return [DATASETS.module_name(config.dataset)]

    def external(self, config: PrepareConfig, data_root: str) -> Mapping[str, str]:
        """Fingerprint of the files below the data root, where the data set has one."""
        from workers.data import parse_options

        fingerprint = getattr(DATASETS.load(config.dataset), "fingerprint", None)
        if fingerprint is None:
            return {}
        return {"files": fingerprint(Path(data_root), parse_options(config.dataset, config.options))}

    def run(self, config: PrepareConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write labels, metadata and splits; ``meta`` has the digest that later stages check."""
        from workers.data import describe, load_data, write_index

        data = load_data(config.dataset, config.options, context.data_root)
        context.log(describe(data))
        return write_index(data, config.options, context.output)
