"""``text_report``: one table over methods, tunings and seeds, the figures, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class TextReportConfig(StageConfig):
    """What the page says besides the numbers."""

    title: str = Field(description="heading of the page")
    summary: str = Field(default="", description="one paragraph under the heading")
    command: str = Field(default="", description="what to type to get these numbers again")


class Stage(StageBase[TextReportConfig]):
    """Table (text, Markdown, LaTeX, CSV, JSON), figures, HTML."""

    output: ClassVar[str] = "report"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {
        "evaluations": Port("text_evaluation", many=True, doc="one per method and tuning"),
        "split": Port("text_split", optional=True, doc="for the modularity before tuning"),
        "merged": Port("text_merged", many=True, optional=True, doc="merged networks that the page tells of"),
    }
    Config: ClassVar[type[StageConfig]] = TextReportConfig

    def run(self, config: TextReportConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``table.*``, the PNGs and ``report.html``."""
        from workers.text_report import write_report

        return write_report(config.model_dump(), context)
