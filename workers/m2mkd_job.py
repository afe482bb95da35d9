"""A training phase of m2mKD as a job of a gang: what every rank runs, under Ray Train or alone in this process.

Every rank opens data and networks for itself, all ranks share each update, and rank 0 writes the result and its record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from moe.algorithms.m2mkd import Config
from moe.errors import RunFailed
from workers.context import Context, Input, Reporter
from workers.m2mkd_run import RunSettings, ranks
from workers.m2mkd_train import Phase, train_member

RECORD = "m2mkd_train.json"


class StoredInput(BaseModel):
    """An artifact that a port receives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = Field(description="who made it")
    digest: str = Field(description="of its manifest")
    path: str = Field(description="its folder")
    meta: dict[str, Any] = Field(description="its JSON record")


class TrainJob(BaseModel):
    """Everything a rank needs, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: dict[str, Any] = Field(description="fields of moe.algorithms.m2mkd.Config")
    phase: Phase = Field(description="which network")
    position: int | None = Field(description="module of phase mt")
    settings: dict[str, Any] = Field(description="fields of RunSettings")
    take: list[str] = Field(description="files to start from")
    label: str = Field(description="name in tables")
    run: str = Field(description="run id, for messages")
    member: str = Field(description="name of the member")
    seed: int = Field(description="the only source of randomness")
    threads: int = Field(ge=1, description="compute threads of each rank")
    inputs: dict[str, list[StoredInput]] = Field(description="port -> artifacts")
    output: str = Field(description="folder of the result")
    scratch: str = Field(description="folder that survives crashes; every rank can read it")
    data_root: str = Field(description="folder with prepared data sets")


@dataclass
class _RankContext:
    """A member's context on one rank: only rank 0 speaks."""

    run: str
    member: str
    seed: int
    threads: int
    inputs: Mapping[str, Sequence[Input]]
    output: Path
    scratch: Path
    data_root: Path
    reporter: Reporter | None

    def progress(self, done: int, total: int, **values: float) -> None:
        """See :class:`workers.context.Reporter`."""
        if self.reporter is not None:
            self.reporter.progress(done, total, **values)

    def log(self, message: str) -> None:
        """See :class:`workers.context.Reporter`."""
        if self.reporter is not None:
            self.reporter.log(message)

    def check(self) -> None:
        """See :class:`workers.context.Reporter`."""
        if self.reporter is not None:
            self.reporter.check()


def train_rank(config: dict[str, Any]) -> None:
    """Run the job on this rank; rank 0 leaves the network in ``output`` and its record in ``scratch``.

    Args:
        config: fields of :class:`TrainJob`, and on rank 0 ``reporter``.

    Raises:
        SpecError, CheckpointError, DataError: inputs that do not fit together.
        RunFailed: the loss is not finite.
        Interrupted: a stop was asked for; the last checkpoint is kept.
    """
    job = TrainJob(**{name: value for name, value in config.items() if name != "reporter"})
    context = _RankContext(
        run=job.run,
        member=job.member,
        seed=job.seed,
        threads=job.threads,
        inputs={
            port: [Input(a.member, a.digest, Path(a.path), a.meta) for a in artifacts]
            for port, artifacts in job.inputs.items()
        },
        output=Path(job.output),
        scratch=Path(job.scratch),
        data_root=Path(job.data_root),
        reporter=config.get("reporter"),
    )
    settings = RunSettings(**{name: _tuple(value) for name, value in job.settings.items()})
    meta = train_member(
        Config(**job.method), job.phase, job.position, settings, job.take, job.label, cast("Context", context)
    )
    if ranks()[0] == 0:
        (context.scratch / RECORD).write_text(json.dumps(meta, sort_keys=True))


def train_on_ranks(
    config: Config,
    phase: Phase,
    position: int | None,
    settings: RunSettings,
    take: Sequence[str],
    label: str,
    context: Context,
) -> dict[str, Any]:
    """:func:`workers.m2mkd_train.train_member` on the member's gang of ranks; arguments and errors as there.

    Raises:
        RunFailed: the ranks ended without a record.
    """
    job = TrainJob(
        method=config.model_dump(mode="json"),
        phase=phase,
        position=position,
        settings=asdict(settings),
        take=list(take),
        label=label,
        run=context.run,
        member=context.member,
        seed=context.seed,
        threads=context.threads,
        inputs={
            port: [
                StoredInput(member=a.member, digest=a.digest, path=str(a.path), meta=dict(a.meta)) for a in artifacts
            ]
            for port, artifacts in context.inputs.items()
        },
        output=str(context.output),
        scratch=str(context.scratch),
        data_root=str(context.data_root),
    )
    record = context.scratch / RECORD
    record.unlink(missing_ok=True)
    context.train(train_rank, job.model_dump(mode="json"))
    if not record.is_file():
        raise RunFailed("The ranks ended without a result.", "Resume the run.")
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
