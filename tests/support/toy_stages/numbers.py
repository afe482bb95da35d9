"""A source: ``count`` members ``item=i``, each writes ``value + i``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from orchestrator.stages.base import Member, StageBase, StageConfig
from tests.support.toy_stages._files import Crash, attempts, crash, write_value
from workers.context import Context


class NumbersConfig(StageConfig):
    """What to write, and how to misbehave first."""

    value: int = Field(1, description="The first member's number.")
    count: int = Field(1, ge=0, description="Members of the fan-out.")
    sleep_s: float = Field(0.0, ge=0, description="Seconds to wait before writing.")
    fail_times: int = Field(0, ge=0, description="Attempts of each member that fail before one works.")
    fail_how: Crash = Field("error", description="How they fail.")
    fail_member: int | None = Field(None, description="Only this item fails; all when null.")
    size_kb: int = Field(0, ge=0, description="Size of an extra file, filler.bin, in KiB.")
    seeded: bool = Field(False, description="Add the member's seed to its number.")


class Stage(StageBase[NumbersConfig]):
    """Writes numbers."""

    output = "number"
    Config = NumbersConfig

    def members(self, config: NumbersConfig) -> list[Member]:
        """Items 0 .. count-1; a single one has no name."""
        if config.count == 1:
            return [Member("", {"item": 0})]
        return [Member(f"item={i}", {"item": i}, weight=1.0 + i) for i in range(config.count)]

    def run(self, config: NumbersConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Fail ``fail_times`` times, then write the number."""
        item = int(member.params["item"])
        fails = config.fail_times and (config.fail_member is None or config.fail_member == item)
        if fails and attempts(context.scratch) < config.fail_times:
            crash(config.fail_how, f"item {item} fails on purpose")
        if config.sleep_s:
            time.sleep(config.sleep_s)
        if config.size_kb:
            (context.output / "filler.bin").write_bytes(bytes([item % 256]) * (config.size_kb * 1024))
        value = config.value + item + (context.seed if config.seeded else 0)
        context.metrics({"toy/value": float(value)})
        return write_value(context.output, value)
