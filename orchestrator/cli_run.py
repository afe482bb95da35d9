"""Commands that run things: submit, plan, validate, resume, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import cli_options as opt

if TYPE_CHECKING:
    from orchestrator.graph import Graph
    from orchestrator.loading import Loaded
    from orchestrator.plan import Plan
    from orchestrator.runs import Run
    from orchestrator.spec import PipelineSpec
    from orchestrator.store import Store


def _load(pipeline: Path, profile: str | None, overrides: list[str] | None, seeds: str | None) -> Loaded:
    from orchestrator import console
    from orchestrator.loading import load

    loaded = load(pipeline, profile, opt.all_overrides(overrides, seeds))
    for warning in loaded.warnings:
        console.note(f"warning: {warning}")
    return loaded


def _load_any(
    pipeline: Path, profile: str | None, overrides: list[str] | None, seeds: str | None, sweep: list[str] | None
) -> tuple[PipelineSpec, Graph, list[dict[str, Any]]]:
    """The pipeline, or all points of a sweep in one, with the points."""
    if not sweep:
        loaded = _load(pipeline, profile, overrides, seeds)
        return loaded.spec, loaded.graph, []
    from orchestrator import console
    from orchestrator.sweeping import load_sweep

    swept = load_sweep(pipeline, profile, opt.all_overrides(overrides, seeds), sweep)
    for warning in swept.warnings:
        console.note(f"warning: {warning}")
    return swept.spec, swept.graph, swept.record()


def submit(
    pipeline: opt.Pipeline,
    profile: opt.Profile = None,
    overrides: opt.Overrides = None,
    seeds: opt.Seeds = None,
    on: opt.On = "ray",
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    data: opt.DataRoot = None,
    sweep: opt.Sweep = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    run_name: opt.RunName = None,
    cluster: opt.Cluster = None,
    detach: opt.Detach = False,
    any_code: opt.AnyCode = False,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Run a pipeline. What was done before is a hit and is not done again."""
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    _require_used(on, store, cluster, dry_run, detach or any_code)
    if dry_run:
        plan(pipeline, profile, overrides, seeds, on, store, data, sweep, json)
        return
    spec, graph, points = _load_any(pipeline, profile, overrides, seeds, sweep)
    options: dict[str, Any] = {
        "on": on,
        "data": str(opt.data_root(data, store).absolute()),
        "pipeline": str(pipeline),
        "profile": profile,
        "set": opt.all_overrides(overrides, seeds),
        **({"sweep": points} if points else {}),
    }
    if cluster is not None:
        from orchestrator.cli_cluster import Submission, submit_remote

        given = Submission(spec, graph, run_name, options, store, data, any_code, json, quiet)
        submit_remote(given, cluster, detach)
        return
    place = Store.open(store)
    runs = RunStore(place)
    if run_name is None:
        run = runs.create(spec, options=options)
    else:
        from orchestrator.cluster_runs import run_named
        from orchestrator.console import note

        run = run_named(runs, spec, run_name, options, note)
    drive_run(run, place, on, opt.data_root(data, store), quiet, json)


def _require_used(on: str, store: str, cluster: str | None, dry_run: bool, remote: bool) -> None:
    """Refuse options that would have no effect with, or without, ``--cluster``.

    Raises:
        SpecError: there is one; ``remote`` says that --detach or --any-code is given.
    """
    from moe.errors import SpecError

    if cluster is None:
        if remote:
            raise SpecError("--detach and --any-code are for --cluster.", "Name a cluster: --cluster cluster.yaml")
        return
    if on != "ray":
        raise SpecError(f"--on {on} and --cluster {cluster} are given.", "Use one of them.")
    if dry_run:
        raise SpecError(
            "--dry-run plans for this machine and its store, not for --cluster.",
            "Leave --cluster out, or call `moepipe plan FILE --on auto` on the cluster.",
        )
    opt.store_there(store)


def drive_run(run: Run, store: Store, on: str, data_root: Path, quiet: bool, json: bool) -> None:
    """Run to the end and say what came out. Raises the first error when a member failed."""
    from orchestrator import console, result
    from orchestrator.graph import build_graph
    from orchestrator.live import make_display
    from orchestrator.plan import make_plan
    from orchestrator.submit import drive, make_executor

    graph = build_graph(run.spec())
    plan = make_plan(graph, store, data_root=data_root)
    run.save_plan(plan)
    _require_sources(run, plan)
    if not quiet:
        todo = len(plan.entries) - plan.count("hit")
        wait = "; starting Ray takes some seconds" if on == "ray" and todo else ""
        console.note(f"{run.id}: {len(plan.entries)} members, {plan.count('hit')} hits, {todo} to run (on {on}{wait})")
    timed = [name for name, view in graph.stages.items() if view.spec.timeout_s is not None]
    if on == "inline" and timed:
        console.note(f"warning: timeout_s of {', '.join(timed)} has no effect inline: nobody can stop a member there")
    display = make_display(graph.nodes, quiet)
    driven = drive(run, graph, store, make_executor(on, store), data_root, display)
    flags = opt.store_flag(store.folder if store.is_local else store.url)
    error = result.failure(run, graph, driven, flags)
    if error is not None:
        raise error
    document = result.describe(run, graph, store, driven)
    document |= result.describe_search(run, graph, store, driven)
    if json:
        console.emit_json(console.finite({**document, "tracking": result.describe_tracking(driven.tracking())}))
        return
    result.show(document)
    result.show_next(document, graph, driven.tracking(), flags)


def _require_sources(run: Run, plan: Plan) -> None:
    """Refuse to start when data or weights of any stage are not there; the run ends as failed."""
    from moe.errors import MoepipeError

    try:
        plan.require_sources()
    except MoepipeError as error:
        found = {name: entry.artifact for name, entry in plan.entries.items() if entry.artifact}
        with run.lock():
            run.finish("failed", found, hits=len(found), failures={"": error.message})
        raise


def plan(
    pipeline: opt.Pipeline,
    profile: opt.Profile = None,
    overrides: opt.Overrides = None,
    seeds: opt.Seeds = None,
    on: opt.On = "ray",
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    data: opt.DataRoot = None,
    sweep: opt.Sweep = None,
    json: opt.Json = False,
) -> None:
    """Say what submit would do: hit or miss for each member and why, resources, time."""
    from orchestrator import cli_plan, console
    from orchestrator.cluster_fit import fits
    from orchestrator.cluster_fit import to_json as fit_json
    from orchestrator.plan import make_plan
    from orchestrator.store import Store

    spec, graph, _ = _load_any(pipeline, profile, overrides, seeds, sweep)
    place, root = Store.open(store), opt.data_root(data, store)
    capacity = cli_plan.capacity_of(on, place)
    made = make_plan(graph, place, data_root=root, capacity=capacity)
    todo = [name for name, entry in made.entries.items() if entry.state != "hit"]
    room = fits(graph, todo, capacity) if capacity is not None else []
    if json:
        console.emit_json(console.finite({"pipeline": spec.name, "on": on, **made.to_json(), "fit": fit_json(room)}))
    else:
        cli_plan.show(made)
        if room:
            console.say("at once: " + ", ".join(fit.words() for fit in room))
    made.require_feasible()


def validate(
    pipeline: opt.Pipeline,
    profile: opt.Profile = None,
    overrides: opt.Overrides = None,
    seeds: opt.Seeds = None,
    json: opt.Json = False,
) -> None:
    """Check a pipeline file: every error at once, with line and column. Runs nothing."""
    from orchestrator import console
    from orchestrator.loading import load

    loaded = load(pipeline, profile, opt.all_overrides(overrides, seeds))
    document: dict[str, Any] = {
        "pipeline": loaded.spec.name,
        "valid": True,
        "files": [str(path) for path in loaded.files],
        "profiles": list(loaded.profiles),
        "stages": {name: len(view.nodes) for name, view in loaded.graph.stages.items()},
        "members": len(loaded.graph.nodes),
        "warnings": [warning.to_json() for warning in loaded.warnings],
    }
    if json:
        console.emit_json(document)
        return
    for warning in loaded.warnings:
        console.note(f"warning: {warning}")
    stages = ", ".join(f"{name} ({count})" for name, count in document["stages"].items())
    console.say(f"{pipeline}: ok. {document['members']} members in {len(loaded.graph.stages)} stages: {stages}")


def resume(
    run: opt.RunId = "latest",
    on: Annotated[
        str | None, typer.Option("--on", metavar="WHERE", help="Where; by default as the run was started.")
    ] = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    data: opt.DataRoot = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Continue a run: finished members are hits, others go on from their last checkpoint."""
    from orchestrator import console
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    place = Store.open(store)
    runs = RunStore(place)
    options = dict(runs.open(run).info.get("options") or {})
    root = data or Path(options.get("data") or opt.data_root(None, store))
    where = on or str(options.get("on") or "ray")
    chosen = runs.resume(run, {**options, "on": where, "data": str(root.absolute())})
    if chosen.origin and not quiet:
        console.note(f"{chosen.origin} has ended; {chosen.id} continues it")
    drive_run(chosen, place, where, root, quiet, json)


def cancel(
    run: opt.RunId = "latest",
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for it to stop.")] = 30.0,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Stop a running run at its members' next checkpoints."""
    from moe.errors import SpecError
    from orchestrator import console
    from orchestrator.runs import RunStore
    from orchestrator.store import Store
    from orchestrator.submit import cancel as ask_to_stop

    found = RunStore(Store.open(store)).open(run)
    before = found.status
    if before != "running":
        raise SpecError(f"Run {found.id} is not running: it is {before}.", "Nothing was changed.")
    after = ask_to_stop(found, wait)
    if json:
        console.emit_json({"run": found.id, "status": after})
    elif after == "running":
        console.say(
            f"{found.id} was asked to stop and is still working towards a checkpoint: moepipe status {found.id}"
        )
    else:
        console.say(f"{found.id}: {after}. Continue it with: moepipe resume {found.id}")
