"""``m2mkd_assemble``: the student modules put together into the modular model, with a report of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from orchestrator.stages._m2mkd import MethodConfig, file_digests, missing_files
from orchestrator.stages.base import Member, Port, StageBase
from workers.context import Context


class M2mkdAssembleConfig(MethodConfig):
    """From which modules."""

    files: tuple[str, ...] = Field(
        default=(), description="student checkpoints in order of position, e.g. released ones, in place of `modules`"
    )

    @model_validator(mode="after")
    def _files(self) -> M2mkdAssembleConfig:
        count = len(self.method.meta.depths)
        if self.files and len(self.files) != count:
            raise ValueError(f"files: {len(self.files)} student files for {count} positions; give one for each.")
        double = sorted({name for name in self.files if self.files.count(name) > 1})
        if double:
            raise ValueError(f"files: {', '.join(double)} is there more than once.")
        return self


class Stage(StageBase[M2mkdAssembleConfig]):
    """Assemble the modular model from its students."""

    output: ClassVar[str] = "m2mkd_network"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "modules": Port("m2mkd_module", many=True, optional=True, doc="one student per position"),
    }
    Config: ClassVar[type[M2mkdAssembleConfig]] = M2mkdAssembleConfig

    def members(self, config: M2mkdAssembleConfig) -> list[Member]:
        """One member."""
        return [config.member("assemble")]

    def examine(self, config: M2mkdAssembleConfig) -> Sequence[tuple[tuple[str | int, ...], str, str]]:
        """Files that are not there, told before any earlier stage is run."""
        return missing_files("files", config.files)

    def external(self, config: M2mkdAssembleConfig, data_root: str) -> Mapping[str, str]:
        """The student files."""
        return file_digests(config.files, data_root)

    def run(self, config: M2mkdAssembleConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the model and ``assembly.json``."""
        from workers.m2mkd_assemble import assemble_member

        return assemble_member(config.method, config.files, context)
