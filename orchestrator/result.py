"""The end of a submit: the domain table, where the report is, where MLflow shows it, and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe.errors import Interrupted, MoepipeError, RunFailed
from orchestrator import console
from orchestrator.cli_show import reports
from orchestrator.graph import Graph
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.submit import Driven
from orchestrator.ui import is_server, run_link

TABLE = "table.txt"
PAGE = "report.html"


def failure(run: Run, graph: Graph, driven: Driven) -> MoepipeError | None:
    """The error to end with when the run did not finish; it keeps code and exit code of its cause."""
    outcome = driven.outcome
    done, everything = len(outcome.artifacts), len(graph.nodes)
    if outcome.status == "interrupted":
        return Interrupted(
            f"Run {run.id} was stopped; {done} of {everything} members are done and kept.",
            f"Continue: moepipe resume {run.id}",
        )
    if outcome.status == "finished":
        return None
    own = {name: failed for name, failed in outcome.failures.items() if failed.cause != "upstream"}
    first = next(iter(own.values()), None)
    error = first.error if first else RunFailed("no member could be run.")
    failed, skipped = len(own), len(outcome.failures) - len(own)
    name = first.node if first else ""
    skips = f", {skipped} skipped because of that" if skipped else ""
    told = type(error).__new__(type(error))
    MoepipeError.__init__(
        told,
        f"{failed} of {everything} members of run {run.id} failed{skips}. First {name}: {error.message}",
        f"{error.hint} All it said: moepipe logs {run.id} {name} - then: moepipe resume {run.id}".strip(),
    )
    return told


def describe(run: Run, graph: Graph, store: Store, driven: Driven) -> dict[str, Any]:
    """What ``submit --json`` prints."""
    tracking = driven.tracking
    return {
        "run": run.id,
        "status": driven.outcome.status,
        "members": len(graph.nodes),
        "hits": driven.outcome.hits,
        "failed": {name: failed.error.message for name, failed in driven.outcome.failures.items()},
        "artifacts": dict(driven.outcome.artifacts),
        "reports": reports(run, store),
        "tracking": None
        if tracking is None
        else {
            "uri": tracking.uri,
            "experiment": tracking.experiment,
            "run": tracking.runs.get("", ""),
            "complete": tracking.complete,
            "error": tracking.error,
        },
        "pipeline": (run.info.get("options") or {}).get("pipeline"),
    }


def show(document: dict[str, Any], store: Store) -> None:
    """The same for people."""
    for report in document["reports"]:
        table = Path(report["path"]) / TABLE
        if table.exists():
            console.say("", table.read_text(encoding="utf-8").rstrip(), "")
    hits = document["hits"]
    made = document["members"] - hits - len(document["failed"])
    console.say(f"{document['run']}: {document['status']}. {hits} hits, {made} made now.")
    for name, message in document["failed"].items():
        console.say(f"  left out (min_success): {name}: {message}")
    for report in document["reports"]:
        page = Path(report["path"]) / PAGE
        console.say(f"report:  {console.short_path(page if page.exists() else page.parent)}")
    if document["tracking"] is not None:
        console.say(f"MLflow:  {_mlflow(document)}")
    pipeline = document["pipeline"] or "PIPELINE"
    console.say(
        "next:",
        f"  moepipe show {document['run']}",
        f"  moepipe plan {pipeline} --set seeds=[3,4,5]",
        "  moepipe ui",
    )


def _mlflow(document: dict[str, Any]) -> str:
    tracking = document["tracking"]
    if tracking["error"]:
        return f"not written ({tracking['error']}); later: moepipe track sync {document['run']}"
    known = tracking["experiment"] and tracking["run"]
    if is_server(tracking["uri"]):
        base = tracking["uri"].rstrip("/")
        return run_link(base, tracking["experiment"], tracking["run"]) if known else base
    link = run_link("http://127.0.0.1:5000", tracking["experiment"], tracking["run"]) if known else "the run"
    later = "" if tracking["complete"] else " (being written)"
    return f"moepipe ui, then {link}{later}"
