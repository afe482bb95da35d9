"""``m2mkd_teach``: every student module learns from its teacher module, each as a member of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from orchestrator.stages._m2mkd import TrainingConfig
from orchestrator.stages.base import Member, Port, StageBase
from workers.context import Context


class M2mkdTeachConfig(TrainingConfig):
    """How the modules are trained."""


class Stage(StageBase[M2mkdTeachConfig]):
    """Distil each student module from its teacher module inside the frozen meta model."""

    output: ClassVar[str] = "m2mkd_module"
    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port("data", doc="the prepared data set"),
        "meta": Port("m2mkd_network", doc="the meta model of phase pt"),
        "teacher": Port("m2mkd_network", doc="the whole teacher of phase ft; a member reads its own module alone"),
        "cache": Port("m2mkd_cache", optional=True, doc="what the frozen networks say; without it they run along"),
    }
    Config: ClassVar[type[M2mkdTeachConfig]] = M2mkdTeachConfig

    def members(self, config: M2mkdTeachConfig) -> list[Member]:
        """One member per position."""
        return config.positions("student")

    def run(self, config: M2mkdTeachConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the student's weights; ``meta`` has its position, spec, scores and history."""
        from workers.m2mkd_teach import teach_member

        return teach_member(config.method, int(member.params["position"]), config.run_settings(), context)
