"""``m2mkd_report``: one table over models and seeds, learning curves, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class M2mkdReportConfig(StageConfig):
    """What the page says besides the numbers."""

    title: str = Field(description="heading of the page")
    summary: str = Field(default="", description="one paragraph under the heading")
    command: str = Field(default="", description="what to type to get these numbers again")
    baseline: str = Field(default="", description="label of the model that gains are counted from; empty: no gains")


class Stage(StageBase[M2mkdReportConfig]):
    """Table (text, Markdown, LaTeX, CSV, JSON), curves, HTML."""

    output: ClassVar[str] = "report"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {
        "metrics": Port("m2mkd_metrics", many=True, doc="one per seed"),
        "modules": Port("m2mkd_module", many=True, optional=True, doc="the students, for a table of their own"),
    }
    Config: ClassVar[type[M2mkdReportConfig]] = M2mkdReportConfig

    def run(self, config: M2mkdReportConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``table.*``, ``curves.png`` and ``report.html``."""
        from workers.m2mkd_report import write_report

        return write_report(config.model_dump(), context)
