"""Runs with a name of the caller's choosing: submitting the same name again continues instead of beginning anew.

That is what makes a restarted head, a requeued Slurm job and a retried Kubernetes job cheap: what was finished is a
hit, what was cut off goes on from its checkpoints.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from moe.errors import EnvironmentProblem, SpecError
from orchestrator.cache import code_parts
from orchestrator.graph import Graph
from orchestrator.runs import Run, RunStore, read_json
from orchestrator.spec import PipelineSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WAIT_S = 90.0
_POLL_S = 1.0


def run_named(
    runs: RunStore,
    spec: PipelineSpec,
    name: str,
    options: Mapping[str, Any],
    say: Callable[[str], None] = lambda message: None,
) -> Run:
    """The run to drive for ``name``: a new one, the same one when its driver is gone, or one that continues it.

    A driver on another machine that fell silent a moment ago is waited for, since it may be the one that was just lost.

    Raises:
        SpecError: not a name, or the name belongs to another pipeline.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} is not a run's name.", "Use letters, digits, '.', '_' and '-', at most 100.")
    found = newest(runs, name)
    if found is None:
        return runs.create(spec, options=options, name=name)
    if found.spec().canonical() != spec.canonical():
        raise SpecError(
            f"Run {name} exists and is of another pipeline, or of the same one with other values.",
            "Choose another name; what both share is a hit.",
        )
    _wait_for_silence(found, say)
    return runs.resume(found.id, options)


def newest(runs: RunStore, name: str) -> Run | None:
    """The run of this name, or the last one that continues it."""
    known = {run.id: run for run in runs.list()}
    if name not in known:
        return None
    after = {run.origin: run.id for run in reversed(list(known.values())) if run.origin}
    last = name
    while last in after:
        last = after[last]
    return runs.open(last)


def _wait_for_silence(run: Run, say: Callable[[str], None]) -> None:
    """Until the run of a lost machine counts as lost; one whose heart beats on is left running (its lock refuses)."""
    beat, started = _beat(run), time.monotonic()
    told = False
    while run.status == "running" and time.monotonic() - started < _WAIT_S:
        owner = read_json(run.path / "owner.json") or {}
        if owner.get("host") == socket.gethostname() or _beat(run) != beat:
            return
        if not told:
            say(f"{run.id} was driven by {owner.get('host')} until a moment ago; waiting whether it is still there")
            told = True
        time.sleep(_POLL_S)


def _beat(run: Run) -> float:
    try:
        return (run.path / "owner.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def code_of(graph: Graph) -> dict[str, str]:
    """Digests of the source files that the stages of a graph are made of, as in their keys."""
    found: dict[str, str] = {}
    for stage in {node.stage: node for node in graph.nodes.values()}.values():
        found.update(code_parts(stage.kind, stage.config))
    return found


def require_code(graph: Graph, wanted: Mapping[str, str]) -> None:
    """Check that this machine has the code of the machine that submitted.

    Raises:
        EnvironmentProblem: it has not; the results would be filed under other keys.
    """
    here = code_of(graph)
    other = sorted(name for name in {*here, *wanted} if here.get(name) != wanted.get(name))
    if other:
        names = ", ".join(name.removeprefix("code.") for name in other[:3])
        raise EnvironmentProblem(
            f"The cluster has other code than the machine that submits: {names}"
            + (f" and {len(other) - 3} more files." if len(other) > 3 else "."),
            "Install the same wheel there (pip wheel --no-deps -w dist . ; ray up cluster.yaml), or pass --any-code.",
        )
