"""``report``: one table over all seeds, the figures, and one HTML page that opens anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class ReportConfig(StageConfig):
    """What the page says besides the numbers."""

    title: str = Field(description="heading of the page and of the table")
    summary: str = Field(default="", description="one paragraph under the heading")
    command: str = Field(default="", description="what to type to get these numbers again")
    before: str = Field(default="student", description="method drawn as 'before' in the per-domain bars")
    after: str = Field(default="student_distill", description="method drawn as 'after'")


class Stage(StageBase[ReportConfig]):
    """One table over all seeds, figures, and one HTML page."""

    output: ClassVar[str] = "report"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {
        "metrics": Port("metrics", many=True, doc="evaluations, one per seed"),
        "student": Port("student", many=True, optional=True, doc="for the training curves"),
    }
    Config: ClassVar[type[StageConfig]] = ReportConfig

    def run(self, config: ReportConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``table.txt``, ``table.md``, ``table.json``, ``report.html`` and the PNGs."""
        from workers.report_member import write_report

        return write_report(config.model_dump(), context)
