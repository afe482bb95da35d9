"""A stage that makes a student in no time, out of a bundle; the seed is part of its record."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestrator.stages.base import Member, StageBase, StageConfig
from serve.loading import locate
from workers.context import Context
from workers.modelfile import MODEL_FILE


class StudentConfig(StageConfig):
    """Where the bundle lies."""

    bundle: str = Field(description="folder of the bundle")
    note: str = Field(default="", description="makes another artifact of the same weights")


class Stage(StageBase[StudentConfig]):
    """Copies a bundle's student."""

    output = "student"
    Config = StudentConfig

    def run(self, config: StudentConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the weights."""
        student = locate(config.bundle).student
        shutil.copyfile(Path(student.folder) / MODEL_FILE, context.output / MODEL_FILE)
        dropped = ("aggregator", "name", "class_names")
        meta = {key: value for key, value in student.meta.items() if key not in dropped}
        return {**meta, "seed": context.seed, "note": config.note}
