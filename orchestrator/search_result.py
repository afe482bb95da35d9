"""What the searches of a run found, for the end of a submit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from moe.errors import NotFoundError
from orchestrator.graph import Graph
from orchestrator.store import Store
from workers.search_propose import shown

_MOST = 12


def describe_searches(graph: Graph, store: Store, artifacts: Mapping[str, str]) -> list[dict[str, Any]]:
    """One record per search: ``node``, ``best`` (trial, values, objective), ``trials`` by state, ``folder``."""
    found = []
    for view in graph.stages.values():
        for node in view.nodes if view.stage.leads else ():
            with suppress(NotFoundError, KeyError):
                artifact = store.artifact(artifacts[node])
                meta = artifact.meta["search"]
                folder = str(store.local_path(artifact) / "search")
                known = {name: meta[name] for name in ("metrics", "selection", "best", "trials")}
                found.append({"node": node, **known, "folder": folder})
    return found


def search_lines(searches: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records as lines for people."""
    lines = []
    for search in searches[:_MOST]:
        best, trials = search["best"], search["trials"]
        scores = ", ".join(f"{n} {v:.5g}" for n, v in zip(search["metrics"], best["objective"], strict=False))
        failed = f", {trials['failed']} failed" if trials["failed"] else ""
        stopped = f", {trials['stopped']} stopped early" if trials["stopped"] else ""
        word = "ending with" if len(best.get("schedule", ())) > 1 else "with"
        lines.append(
            f"{search['node']}: {scores} {word} {shown(best['values'])} ({trials['done']} trials{failed}{stopped})"
        )
    more = len(searches) - _MOST
    return [*lines, *([f"and {more} more searches"] if more > 0 else [])]
