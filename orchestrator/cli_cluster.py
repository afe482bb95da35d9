"""Commands for clusters: token, up, down, jobs, logs, cancel; and those that ``submit`` and the cluster call."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import cli_options as opt
from orchestrator.cli_cluster_hosts import down, up

if TYPE_CHECKING:
    from orchestrator.cluster_doctor import NodeReport
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.graph import Graph
    from orchestrator.spec import PipelineSpec

app = typer.Typer(help="Run pipelines on a Ray cluster from here.", no_args_is_help=True)
app.command()(up)
app.command()(down)

Where = Annotated[
    str,
    typer.Argument(metavar="CLUSTER", help="The cluster's YAML (cluster.yaml), or http://host:8265 of its dashboard."),
]
JobRun = Annotated[str, typer.Argument(metavar="RUN", help="Run id.")]


@app.command()
def token(
    path: Annotated[Path, typer.Option("--path", help="Where it lies.")] = Path("~/.moepipe/ray_token"),
) -> None:
    """Make the token that lets this machine talk to the cluster, and the cluster's hosts to each other."""
    from orchestrator import console
    from orchestrator.cluster_tunnel import make_token

    new = make_token(path)
    console.say(f"{path.expanduser()}: {'made' if new else 'was there already'}, readable by you alone")


@app.command()
def jobs(where: Where = "cluster.yaml", json: opt.Json = False) -> None:
    """List the jobs of runs on a cluster, newest first."""
    from orchestrator import console
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.cluster_tunnel import address_of

    with address_of(where) as address:
        found = Jobs(address).list()
    if json:
        console.emit_json({"jobs": found})
        return
    rows = [
        (item["run"], item["job"], item["status"], time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["started"])))
        for item in found
    ]
    console.show_table(("run", "job", "status", "started"), rows)


@app.command()
def logs(run: JobRun, where: Where = "cluster.yaml", follow: opt.Follow = False) -> None:
    """Print what a run's driver says; with -f until it ends, and end with its exit code.

    `moepipe logs` reads the run record in the store instead, also when the cluster is gone.
    """
    import sys

    from moe.errors import NotFoundError
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.cluster_tunnel import address_of

    with address_of(where) as address:
        there = Jobs(address)
        found = there.of_run(run)
        if not found:
            raise NotFoundError(f"Run {run} has no job at {address}.", "moepipe cluster jobs lists them.")
        if not follow:
            sys.stdout.write(there.logs(found[-1]))
            return
        _follow(there, found[-1], run, where)


@app.command()
def cancel(run: JobRun, where: Where = "cluster.yaml") -> None:
    """Ask a run's job to stop at its members' next checkpoints."""
    from orchestrator import console
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.cluster_tunnel import address_of

    with address_of(where) as address:
        job = Jobs(address).stop(run)
    console.say(f"{job} was asked to stop. Submit the same pipeline with --run {run} to continue it.")


@app.command(hidden=True)
def drive(
    submission: Path,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    data: opt.DataRoot = None,
) -> None:
    """What a submitted job runs, on the head of the cluster."""
    import json as js

    from orchestrator import cli_run, console
    from orchestrator.cluster_runs import require_code, run_named
    from orchestrator.graph import build_graph
    from orchestrator.runs import RunStore
    from orchestrator.spec import spec_from_record
    from orchestrator.store import Store

    given: dict[str, Any] = js.loads(submission.read_text(encoding="utf-8"))
    spec = spec_from_record(js.dumps(given["spec"]).encode())
    if given["code"] is not None:
        require_code(build_graph(spec), given["code"])
    place = Store.open(given["store"] or store)
    root = Path(given["data"]) if given["data"] else opt.data_root(data, store)
    options = {**given["options"], "on": "auto", "data": str(root.absolute())}
    run = run_named(RunStore(place), spec, given["run"], options, console.note)
    cli_run.drive_run(run, place, "auto", root, quiet=bool(given.get("quiet")), json=bool(given["json"]))


@dataclass(frozen=True)
class Submission:
    """What is handed to a cluster.

    Attributes:
        spec: the resolved pipeline, and ``graph`` its expansion.
        run: name of the run; None makes one.
        options: how it was called, for the run record.
        store: of this machine; it counts there when it is a URL, else the cluster's own MOEPIPE_STORE does.
        data: folder with prepared data sets *on the cluster*; None: its MOEPIPE_DATA.
        any_code: don't compare the code.
        json: print JSON.
        quiet: no progress.
    """

    spec: PipelineSpec
    graph: Graph
    run: str | None
    options: Mapping[str, Any]
    store: str
    data: Path | None
    any_code: bool
    json: bool
    quiet: bool = False

    def document(self, name: str) -> dict[str, Any]:
        """What travels: plain JSON."""
        from orchestrator.cluster_runs import code_of

        return {
            "run": name,
            "spec": self.spec.model_dump(mode="json"),
            "code": None if self.any_code else code_of(self.graph),
            "store": opt.store_there(self.store),
            "data": opt.data_there(self.data),
            "options": {key: value for key, value in self.options.items() if key not in ("on", "data")},
            "json": self.json,
            "quiet": self.quiet,
        }


def submit_remote(given: Submission, where: str, detach: bool) -> None:
    """Hand a pipeline to a cluster; follow it to its end unless ``detach``, and end with its exit code."""
    from orchestrator import console
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.cluster_tunnel import address_of

    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = given.run or f"{given.spec.name}-{stamp}-{secrets.token_hex(2)}"
    with address_of(where) as address:
        there = Jobs(address)
        job, new = there.submit(name, given.document(name))
        console.note(f"{name}: {f'submitted to {where}' if new else f'is running at {where} already'} as job {job}")
        if not detach:
            _follow(there, job, name, where, given.json)
            return
    if given.json:
        console.emit_json({"run": name, "job": job, "new": new, "cluster": where})
    console.note(f"Follow it: moepipe cluster logs -f {name} {where}")
    console.note(f"Stop it:   moepipe cluster cancel {name} {where}")


def _follow(there: Jobs, job: str, run: str, where: str, json: bool = False) -> None:
    """Pass on a job's words (to stderr when stdout is for JSON); Ctrl-C leaves it running."""
    import sys

    from orchestrator import console

    out = sys.stderr if json else sys.stdout

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    try:
        ended = there.follow(job, write)
    except KeyboardInterrupt:
        console.note(f"The run goes on. Come back with: moepipe cluster logs -f {run} {where}")
        raise typer.Exit(130) from None
    if json:
        console.emit_json(
            {"run": run, "job": job, "status": ended.status, "exit_code": ended.exit_code, "cluster": where}
        )
    if ended.exit_code:
        console.note(f"{job}: {ended.status.lower()}, exit code {ended.exit_code}")
        raise typer.Exit(ended.exit_code)


def doctor_nodes(where: str, store: str, data: Path | None, json: bool) -> None:
    """`moepipe doctor --cluster`: the checks of every node in one table, with what to do."""
    from moe.errors import EnvironmentProblem
    from orchestrator import console
    from orchestrator.cluster_doctor import examine_cluster, from_json, to_json
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.cluster_tunnel import address_of

    if where.endswith((".yaml", ".yml")) or where.startswith(("http://", "https://")):
        words = ["doctor", "--cluster", "auto", "--json"]
        for option, value in (("--store", opt.store_there(store)), ("--data", opt.data_there(data))):
            words += [] if value is None else [option, value]
        with address_of(where) as address:
            there = Jobs(address)
            ended = there.run_command("doctor", words)
            reports = from_json(there.logs(ended.job))
    else:
        local = Path(opt.DEFAULT_STORE if "://" in store else store).absolute()
        tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local / 'mlflow.db'}"
        reports = examine_cluster(where, store, str(opt.data_root(data, store).absolute()), tracking)
    failed = sorted({report.node for report in reports if report.failed})
    if json:
        console.emit_json(to_json(reports))
        raise typer.Exit(EnvironmentProblem.exit_code if failed else 0)
    _show_nodes(reports)
    if failed:
        raise EnvironmentProblem(
            f"{len(failed)} of {len(reports)} nodes cannot run pipelines: {', '.join(failed)}.",
            "The fixes stand above.",
        )


def _show_nodes(reports: list[NodeReport]) -> None:
    """One line of what is well on a node, one for each thing that is not, and the fixes once each."""
    from orchestrator import console

    rows, fixes = [], {}
    for report in reports:
        name = f"{report.node} (head)" if report.head else report.node
        amounts = ", ".join(f"{value:g} {key}" for key, value in report.resources.items() if key in ("CPU", "GPU"))
        good = list(dict.fromkeys(check.name for check in report.checks if check.status == "ok"))
        rows.append((name, "resources", "", amounts or "none"))
        rows.append((name, f"{len(good)} checks", "ok", ", ".join(good)))
        for check in report.checks:
            if check.status != "ok":
                rows.append((name, check.name, check.status, check.detail))
                fixes[check.name] = check.fix
    console.show_table(("node", "check", "", "seen"), rows)
    for name, fix in fixes.items():
        if fix:
            console.say(f"{name}: {fix}")
