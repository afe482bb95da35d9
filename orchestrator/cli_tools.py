"""House-keeping commands: init, doctor, ui, gc, version, track."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator import cli_options as opt

track = typer.Typer(help="Write runs to MLflow.", no_args_is_help=True)


@track.callback()
def _track() -> None:
    """Write runs to MLflow."""


@track.command()
def sync(
    run: opt.RunId = "latest",
    uri: Annotated[str | None, typer.Option("--uri", help="MLflow address; by default as the run says.")] = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Write what is missing of a run to MLflow. Doing it twice changes nothing."""
    from orchestrator import console
    from orchestrator.mirror import sync as write
    from orchestrator.runs import RunStore
    from orchestrator.store import Store
    from orchestrator.tracking_state import tracking_uri

    place = Store.open(store)
    found = RunStore(place).open(run)
    state = write(found, place, uri or tracking_uri(found.spec(), place))
    document = {
        "run": found.id,
        "uri": state.uri,
        "experiment": state.experiment,
        "mlflow_run": state.runs.get("", ""),
        "mlflow_runs": len(state.runs),
        "complete": state.complete,
    }
    if json:
        console.emit_json(document)
    else:
        rest = "" if state.complete else "; the run goes on"
        console.say(f"{found.id}: {len(state.runs)} MLflow runs at {state.uri}{rest}")


def init(
    method: Annotated[
        str, typer.Argument(metavar="[METHOD]", help="What the pipeline does.", autocompletion=opt.complete_method)
    ] = "meta_dmoe",
    dataset: Annotated[
        str, typer.Option("--dataset", help="Data set to begin with.", autocompletion=opt.complete_dataset)
    ] = "digits5",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a new file instead of stdout.")] = None,
) -> None:
    """Write a commented pipeline to start from; every field is explained in it."""
    import sys

    from moe.errors import SpecError
    from orchestrator import console
    from orchestrator.blobs import write_atomic
    from orchestrator.scaffold import scaffold

    text = scaffold(method, dataset)
    if output is None:
        sys.stdout.write(text)
        return
    if output.exists():
        raise SpecError(f"{output} exists already.", "Choose another name, or remove it first.")
    write_atomic(output, text.encode())
    console.note(f"Wrote {output}. Next: moepipe validate {output}")


def doctor(
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    data: opt.DataRoot = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="WHERE", help="Check every node: auto (this is one), YAML, http://host:8265."
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Check this machine: versions, disk, data, tracking, ports. Every problem comes with a fix."""
    import os

    if cluster is not None:
        from orchestrator.cli_cluster import doctor_nodes

        doctor_nodes(cluster, store, data, json)
        return

    from moe.errors import EnvironmentProblem
    from orchestrator import console
    from orchestrator.doctor import examine

    local = Path(opt.DEFAULT_STORE if "://" in store else store).absolute()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local / 'mlflow.db'}"
    checks = examine(store, opt.data_root(data, store), uri)
    failed = [check for check in checks if check.status == "failed"]
    if json:
        console.emit_json({"healthy": not failed, "checks": checks})
        raise typer.Exit(EnvironmentProblem.exit_code if failed else 0)
    console.show_table(("check", "", "seen"), [(check.name, check.status, check.detail) for check in checks])
    for check in checks:
        if check.fix and check.status != "ok":
            console.say(f"{check.name}: {check.fix}")
    if failed:
        raise EnvironmentProblem(
            f"{len(failed)} of {len(checks)} checks failed: {', '.join(check.name for check in failed)}.",
            "The fixes stand above.",
        )


def ui(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
    links: Annotated[bool, typer.Option("--links", help="Print the links and stop; start nothing.")] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Start MLflow on this store's runs (loopback only) and print links to the comparisons worth a look."""
    from orchestrator import cli_ui
    from orchestrator.store import Store

    cli_ui.serve(Store.open(store), port, start=not links, as_json=json)


def gc(
    keep_last: Annotated[int, typer.Option("--keep-last", min=0, help="Runs of each pipeline to keep.")] = 5,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every artifact; damaged ones go, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and remove nothing.")] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Free space: remove old runs and the artifacts that only they used."""
    from orchestrator import console
    from orchestrator.gc import collect, survey
    from orchestrator.store import Store

    place = Store.open(store)
    garbage = survey(place, keep_last, verify)
    if not dry_run:
        collect(place, garbage)
    document = {
        "dry_run": dry_run,
        "keep_last": keep_last,
        "runs": garbage.runs,
        "artifacts": list(garbage.artifacts),
        "damaged": garbage.damaged,
        "keys": len(garbage.keys),
        "scratch": [str(path) for path in garbage.scratch],
        "bytes": garbage.bytes,
        "busy": garbage.busy,
    }
    if json:
        console.emit_json(document)
        return
    for run in garbage.runs:
        console.say(f"  run {run}")
    for digest, problem in garbage.damaged.items():
        console.say(f"  damaged {digest[:12]}: {problem}")
    verb = "would be" if dry_run else "were"
    console.say(
        f"{len(garbage.runs)} runs, {len(garbage.artifacts)} artifacts and {len(garbage.scratch)} scratch folders "
        f"{verb} removed: {console.size(garbage.bytes)}"
    )


def version(json: opt.Json = False) -> None:
    """Print versions of moepipe and of the libraries that matter."""
    import platform

    from orchestrator import console
    from orchestrator.doctor import versions

    found = versions()
    if json:
        console.emit_json({"moepipe": found.pop("moepipe"), "python": platform.python_version(), "libraries": found})
        return
    console.say(f"moepipe {found.pop('moepipe') or '(not installed)'}, Python {platform.python_version()}")
    console.say(", ".join(f"{name} {number or 'missing'}" for name, number in found.items()))
