"""``domainbed_tables``: the three selection methods side by side, from the runs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context


class TablesConfig(StageConfig):
    """What the page says besides the numbers."""

    title: str = Field(description="heading of the page and of the tables")
    summary: str = Field(default="", description="one paragraph under the heading")
    command: str = Field(default="", description="what to type to get these numbers again")
    selection: tuple[Literal["iid", "loo", "oracle"], ...] = Field(
        default=("iid", "loo", "oracle"),
        min_length=1,
        description="selection methods: training-domain validation, leave-one-domain-out, oracle",
    )


class Stage(StageBase[TablesConfig]):
    """Tables (text, Markdown, LaTeX, CSV, HTML), figures and one page from the runs of a sweep."""

    output: ClassVar[str] = "report"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {"runs": Port("run", many=True, doc="the runs of a sweep")}
    Config: ClassVar[type[StageConfig]] = TablesConfig

    def run(self, config: TablesConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``tables.*``, ``report.html``, the PNGs, and the runs in DomainBed's layout."""
        from workers.domainbed.tables_member import write_tables

        return write_tables(config.model_dump(), context)
