"""The end of a submit: the domain table, where the report is, where MLflow shows it, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from moe.errors import Interrupted, MoepipeError, RunFailed
from orchestrator import console
from orchestrator.cli_show import reports
from orchestrator.graph import Graph
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.submit import Driven
from orchestrator.tracking_state import TrackingState
from orchestrator.ui import is_server, run_link

TABLES = ("table.txt", "tables.txt")
PAGE = "report.html"


def failure(run: Run, graph: Graph, driven: Driven, flags: str) -> MoepipeError | None:
    """The error to end with when the run did not finish; it keeps code and exit code of its cause.

    ``flags``: see :func:`show_next`.
    """
    outcome = driven.outcome
    done, everything = len(outcome.artifacts), len(graph.nodes)
    if outcome.status == "interrupted":
        return Interrupted(
            f"Run {run.id} was stopped; {done} of {everything} members are done and kept.",
            f"Continue: moepipe resume {run.id}{flags}",
        )
    if outcome.status == "finished":
        return None
    own = {name: failed for name, failed in outcome.failures.items() if failed.cause != "upstream"}
    first = next(iter(own.values()), None)
    error = first.error if first else RunFailed("no member could be run.")
    skipped = len(outcome.failures) - len(own)
    skips = f", {skipped} skipped because of that" if skipped else ""
    name = first.node if first else ""
    message = error.message if error.message.startswith(name) else f"{name}: {error.message}"
    then = f"All that it said: moepipe logs {run.id} {name}{flags} | Afterwards: moepipe resume {run.id}{flags}"
    told = type(error).__new__(type(error))
    headline = f"{len(own)} of {everything} members of run {run.id} failed{skips}. {message}"
    MoepipeError.__init__(told, headline, f"{error.hint} {then}".strip())
    return told


def describe(run: Run, graph: Graph, store: Store, driven: Driven) -> dict[str, Any]:
    """What ``submit --json`` prints, but for ``tracking``."""
    return {
        "run": run.id,
        "status": driven.outcome.status,
        "members": len(graph.nodes),
        "hits": driven.outcome.hits,
        "failed": {name: failed.error.message for name, failed in driven.outcome.failures.items()},
        "artifacts": dict(driven.outcome.artifacts),
        "reports": reports(run, store),
        "options": run.info.get("options") or {},
    }


def describe_search(run: Run, graph: Graph, store: Store, driven: Driven) -> dict[str, Any]:
    """``searches``: what each search found; ``sweep``: the scores of every point of ``--sweep``, if any."""
    points = (run.info.get("options") or {}).get("sweep")
    found: dict[str, Any] = {}
    if any(view.stage.leads for view in graph.stages.values()):
        from orchestrator.search_result import describe_searches

        found["searches"] = describe_searches(graph, store, driven.outcome.artifacts)
    if points:
        from orchestrator.sweeping import sweep_table

        found["sweep"] = sweep_table(points, graph, driven.outcome.artifacts, store)
    return found


def describe_tracking(state: TrackingState | None) -> dict[str, Any] | None:
    """The part ``tracking`` of ``submit --json``."""
    if state is None:
        return None
    return {
        "uri": state.uri,
        "experiment": state.experiment,
        "run": state.runs.get("", ""),
        "complete": state.complete,
        "error": state.error,
    }


def show(document: dict[str, Any]) -> None:
    """The tables of the reports and where the pages are, for people."""
    for report in document["reports"]:
        for table in (Path(report["path"]) / name for name in TABLES):
            if table.exists():
                console.say("", table.read_text(encoding="utf-8").rstrip(), "")
    if document.get("searches"):
        from orchestrator.search_result import search_lines

        console.say("", *search_lines(document["searches"]), "")
    if document.get("sweep"):
        from orchestrator.sweeping import table_lines

        console.say("", *table_lines(document["sweep"]), "")
    hits = document["hits"]
    made = document["members"] - hits - len(document["failed"])
    console.say(f"{document['run']}: {document['status']}. {hits} hits, {made} made now.")
    for name, message in document["failed"].items():
        console.say(f"  left out (min_success): {name}: {message}")
    for report in document["reports"]:
        page = Path(report["path"]) / PAGE
        console.say(f"report:  {console.short_path(page if page.exists() else page.parent)}")


def show_next(document: dict[str, Any], graph: Graph, state: TrackingState | None, flags: str) -> None:
    """Where MLflow shows it, and commands to go on with.

    Args:
        document: of :func:`describe`.
        graph: the pipeline; more seeds are of use to one that has stages with seeds.
        state: of the projection; None when there is none.
        flags: options that the commands need to find the same store.
    """
    seeds = f"  moepipe plan {_again(document['options'])} --seeds 3,4,5{flags}"
    seeded = any(view.stage.per_seed for view in graph.stages.values())
    if state is not None:
        console.say(f"MLflow:  {_mlflow(document['run'], state, flags)}")
    console.say(
        "next:",
        f"  moepipe show {document['run']}{flags}",
        *([seeds] if seeded else []),
        f"  moepipe ui{flags}",
    )


def _again(options: dict[str, Any]) -> str:
    """The pipeline with the profile and the overrides of this run, but its seeds."""
    words = [str(options.get("pipeline") or "PIPELINE")]
    words += ["--profile", options["profile"]] if options.get("profile") else []
    chosen = [text for text in options.get("set") or [] if not text.startswith("seeds=")]
    words += [word for text in chosen for word in ("--set", text)]
    return shlex.join(words)


def _mlflow(run: str, state: TrackingState, flags: str) -> str:
    if state.error:
        return f"not written ({state.error.rstrip('.')}); later: moepipe track sync {run}{flags}"
    known = bool(state.experiment and state.runs.get(""))
    if is_server(state.uri):
        base = state.uri.rstrip("/")
        return run_link(base, state.experiment, state.runs[""]) if known else base
    link = run_link("http://127.0.0.1:5000", state.experiment, state.runs[""]) if known else "the run"
    return f"moepipe ui{flags}, then {link}{'' if state.complete else ' (being written)'}"
