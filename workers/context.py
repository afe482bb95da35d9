"""What a piece of work may touch. Stages see only this; executors implement it.

``workers`` never imports ``orchestrator``: the training functions receive an object of this shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Input:
    """A committed artifact handed to a member.

    Attributes:
        member: name of the member that made it, e.g. ``seed=0/group=2``.
        digest: sha256 of its manifest; equal digest means equal bytes.
        path: local folder with its files; read-only.
        meta: the small JSON record that its stage wrote.
    """

    member: str
    digest: str
    path: Path
    meta: Mapping[str, Any]


class Reporter(Protocol):
    """The part of the context that long loops need. Cheap to call every step: implementations limit the rate."""

    def progress(self, done: int, total: int, **values: float) -> None:
        """Say how far the work is; ``values`` (loss, accuracy) are shown beside the bar and logged as metrics."""
        ...

    def log(self, message: str) -> None:
        """One line for the member's log."""
        ...

    def check(self) -> None:
        """Raise :class:`moe.errors.Interrupted` if a stop was asked for. Call it where a checkpoint was just saved."""
        ...


class Context(Reporter, Protocol):
    """One member's world.

    Attributes:
        run: run id; for messages only, never for results.
        member: own name.
        seed: integer derived from the run's seed and the member's name: the only source of randomness.
        threads: compute threads to use (``torch.set_num_threads``); part of the cache key.
        inputs: port name -> artifacts, in member order.
        left_out: port name -> names of members that failed and are tolerated (``min_success``).
        output: empty folder; what is in it when ``run`` returns becomes the artifact.
        scratch: folder that survives crashes and resumes of this member (checkpoints); removed after the commit.
        data_root: folder with prepared data sets.
    """

    run: str
    member: str
    seed: int
    threads: int
    inputs: Mapping[str, Sequence[Input]]
    left_out: Mapping[str, Sequence[str]]
    output: Path
    scratch: Path
    data_root: Path

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record named numbers for the run record and MLflow (slash-separated names)."""
        ...

    def train(self, function: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
        """Run ``function(config)`` on the member's gang of ranks and wait.

        With the Ray executor this is a Ray Train job of ``resources.workers`` ranks; inline it is a call in this
        process with world size 1. ``config`` must be JSON-like; ``config["reporter"]`` is added for rank 0.
        The function reads RANK/WORLD_SIZE from ``torch.distributed`` and checkpoints into a folder of ``scratch``.
        """
        ...


def run_seed(member: str) -> int:
    """The user's seed in a member's name, e.g. 3 for ``seed=3/group=2``; 0 for a member over all seeds."""
    first = member.partition("/")[0]
    return int(first.removeprefix("seed=")) if first.startswith("seed=") else 0
