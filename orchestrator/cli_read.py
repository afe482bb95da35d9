"""Commands that only look: runs, show, status, logs, ls, explain, schema."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import cli_options as opt

if TYPE_CHECKING:
    from orchestrator.runs import Run
    from orchestrator.runview import RunView

NodeId = Annotated[
    str | None, typer.Argument(metavar="NODE", help="Member id like experts/seed=0/group=2, or a stage's name.")
]


def _stamp(when: float | None) -> str:
    return "-" if when is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def view_of(run: Run) -> RunView:
    """A run's events folded into states."""
    from orchestrator.graph import build_graph
    from orchestrator.runview import RunView

    view = RunView(build_graph(run.spec()).nodes)
    for event in run.events():
        view.add(event)
    return view


def _summary(run: Run) -> dict[str, Any]:
    info = run.info
    events = run.path / "events.jsonl"
    last = events.stat().st_mtime if events.exists() else info.get("created")
    status = run.status
    end = time.time() if status == "running" else last
    return {
        "run": run.id,
        "pipeline": run.pipeline,
        "status": status,
        "created": info.get("created"),
        "seconds": round(max(0.0, (end or 0.0) - info.get("created", 0.0)), 3),
        "origin": info.get("origin"),
    }


def runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """List runs, newest first."""
    from orchestrator import console
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    found = [_summary(run) for run in RunStore(Store.open(store)).list()[:limit]]
    if json:
        console.emit_json({"runs": found})
    elif not found:
        console.note(f"No runs in {store} yet. Start one: moepipe submit pipelines/demo/meta_dmoe.yaml")
    else:
        rows = [
            (item["run"], item["pipeline"], item["status"], _stamp(item["created"]), console.seconds(item["seconds"]))
            for item in found
        ]
        console.show_table(("run", "pipeline", "status", "started", "time>"), rows)


def status(
    run: opt.RunId = "latest",
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Say how far a run is, by stage and running member."""
    from orchestrator import console
    from orchestrator.live import numbers
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    found = RunStore(Store.open(store)).open(run)
    view, now = view_of(found), time.time()
    document = {
        **_summary(found),
        "members": {
            state: view.count(state) for state in ("waiting", "running", "hit", "finished", "failed", "skipped")
        },
        "stages": [
            {
                "stage": stage.name,
                "state": stage.state,
                "members": len(stage.members),
                "done": stage.count("hit", "finished"),
                "hits": stage.count("hit"),
                "failed": stage.count("failed"),
                "fraction": round(stage.fraction, 4),
                "seconds": stage.seconds(now),
                "eta_s": stage.eta(now),
            }
            for stage in view.stages
        ],
        "running": [
            {"node": item.node, "done": item.done, "total": item.total, "values": item.values, "eta_s": item.eta(now)}
            for item in view.running()
        ],
    }
    if json:
        console.emit_json(console.finite(document))
        return
    console.say(f"{found.id}: {document['status']}, {console.seconds(document['seconds'])}")
    rows = [
        (
            stage.name,
            stage.state,
            f"{stage.count('hit', 'finished')}/{len(stage.members)}",
            str(stage.count("hit")),
            f"{100 * stage.fraction:.0f}%",
            console.seconds(stage.seconds(now)),
            console.seconds(stage.eta(now)),
        )
        for stage in view.stages
    ]
    console.show_table(("stage", "state", "done>", "hits>", "part>", "time>", "left>"), rows)
    for item in view.running():
        console.say(f"  {item.node}  {item.done}/{item.total}  {numbers(item.values)}")
    if document["status"] == "lost":
        console.note(f"Its driver is gone. Continue it: moepipe resume {found.id}")


def show(
    run: opt.RunId = "latest",
    node: NodeId = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file of the artifacts again.")] = False,
    why: Annotated[bool, typer.Option("--why", help="What it was made from, back to the data; NODE or all.")] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Show a run, a stage or a member: states, artifacts, metrics, where the files are."""
    from orchestrator import cli_show, console
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    place = Store.open(store)
    found = RunStore(place).open(run)
    if why and not verify:
        cli_show.print_why(found, place, node, json)
        return
    view = view_of(found)
    members = list(view.nodes.values()) if node is None else cli_show.find_members(view, node)
    if verify:
        count = cli_show.verify(place, members)
        console.note(f"{count} artifacts verified: every file has the bytes it was written with")
    if why:
        cli_show.print_why(found, place, node, json)
        return
    if node is None:
        document = {**_summary(found), **cli_show.describe_run(found, view, place)}
        if json:
            console.emit_json(console.finite(document))
        else:
            cli_show.print_run(document)
        return
    documents = [cli_show.describe_member(found, member, place) for member in members]
    if json:
        console.emit_json(console.finite({"run": found.id, "members": documents}))
    else:
        for document in documents:
            cli_show.print_member(document)


def logs(
    run: opt.RunId = "latest",
    node: NodeId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    grep: Annotated[str | None, typer.Option("--grep", help="Only lines that match this regular expression.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only what is younger, e.g. 90s, 10m, 2h, 1d.")] = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Print what members said; with NODE everything that it printed, tracebacks included."""
    from orchestrator import cli_logs, console
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    found = RunStore(Store.open(store)).open(run)
    chosen = cli_logs.Filter.parse(grep, since)
    lines = cli_logs.node_lines(found, node, chosen, follow) if node else cli_logs.run_lines(found, chosen, follow)
    if json:
        console.emit_json({"run": found.id, "node": node, "lines": list(lines)})
        return
    for line in lines:
        console.say(line)


def ls(
    what: Annotated[str | None, typer.Argument(metavar="KIND", help="Only one of the kinds listed.")] = None,
    json: opt.Json = False,
) -> None:
    """List what pipelines are made of: pipelines, stages, algorithms, adaptation, datasets."""
    from moe.errors import SpecError, nearest
    from orchestrator import catalogue, console

    chosen = catalogue.KINDS if what is None else (what,)
    if what is not None and what not in catalogue.KINDS:
        raise SpecError(f"There is no kind {what!r} to list.", nearest(what, catalogue.KINDS))
    found = {kind: catalogue.entries(kind) for kind in chosen}
    if json:
        console.emit_json(found)
        return
    for kind, entries in found.items():
        console.show_table((kind, "what it is"), [(entry["name"], entry["title"]) for entry in entries])


def explain(
    path: Annotated[
        str,
        typer.Argument(
            metavar="[PATH]",
            help="e.g. stages.distill, stages.distill.config.lr, retry, datasets.camelyon17.",
            autocompletion=opt.complete_path,
        ),
    ] = "",
    json: opt.Json = False,
) -> None:
    """Explain a field, stage kind, data set or algorithm: type, bounds, default, meaning, presets."""
    from orchestrator import console
    from orchestrator.explain import explain as answer

    found = answer(path)
    if json:
        console.emit_json(console.finite(found.to_json()))
    else:
        console.say(str(found).rstrip())


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
) -> None:
    """Write the JSON Schema of pipeline files, for completion and hover texts in editors."""
    import sys

    from orchestrator import console
    from orchestrator.blobs import write_atomic
    from orchestrator.schema import MODELINE, schema_text

    if output is None:
        sys.stdout.write(schema_text())
        return
    write_atomic(output, schema_text().encode())
    console.note(f"Wrote {output}. First line of a pipeline beside it: {MODELINE.format(path=output.name)}")
