"""``jetpack_report``: starts side by side over the seeds, with convergence curves and updates to given accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class JetpackReportConfig(StageConfig):
    """What the page says besides the numbers."""

    title: str = Field(description="heading of the page")
    summary: str = Field(default="", description="one paragraph under the heading")
    command: str = Field(default="", description="what to type to get these numbers again")
    targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(), description="accuracies to reach, as shares; empty: half, 3/4 and 9/10 of the best final one"
    )
    reference: str | None = Field(default=None, description="start that the others' updates are compared with")


class Stage(StageBase[JetpackReportConfig]):
    """Table, convergence curves and one page from the runs of a `jetpack_train` stage."""

    output: ClassVar[str] = "report"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {"runs": Port("jetpack_run", many=True, doc="the fine-tuned starts")}
    Config: ClassVar[type[StageConfig]] = JetpackReportConfig

    def run(self, config: JetpackReportConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``table.{md,csv,json}``, ``convergence.png`` and ``report.html``."""
        from workers.jetpack_report import write_report

        return write_report(config.model_dump(), context)
