"""``moepipe domainbed``: tables of DomainBed result folders, the public code's or ours, and runs into such a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator import cli_options as opt

app = typer.Typer(help="Read and write DomainBed's result folders.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A sweep's output folder: one folder for each run.")]
Selection = Annotated[
    list[str] | None, typer.Option("--selection", help="iid, loo or oracle; may be repeated. All by default.")
]


@app.command()
def table(
    folder: Folder,
    selection: Selection = None,
    form: Annotated[str, typer.Option("--form", help="text, markdown, latex, csv or html.")] = "text",
    compat: Annotated[bool, typer.Option("--compat", help="Character by character as the public code.")] = False,
    only_done: Annotated[bool, typer.Option("--only-done", help="Leave out runs that have not ended.")] = False,
) -> None:
    """Print the result tables of a sweep (DomainBed's collect_results)."""
    from workers.domainbed.records import read_sweep, records_of
    from workers.domainbed.report import collect
    from workers.domainbed.selection import METHODS
    from workers.domainbed.tables import render

    records = records_of(read_sweep(folder, only_done=only_done))
    text = render(collect(records, selection or tuple(METHODS)), form, compat=compat)  # type: ignore[arg-type]
    typer.echo(text, nl=False)


@app.command()
def top(
    folder: Folder,
    dataset: Annotated[str, typer.Option("--dataset", help="Official name.")],
    algorithm: Annotated[str, typer.Option("--algorithm", help="Official name.")],
    test_env: Annotated[int, typer.Option("--test-env", min=0, help="Number of the held-out domain.")],
    selection: Selection = None,
    json: opt.Json = False,
) -> None:
    """List hyper-parameters by validation accuracy (DomainBed's list_top_hparams)."""
    from moe.errors import NotFoundError
    from orchestrator import console
    from workers.domainbed.records import read_sweep, records_of
    from workers.domainbed.selection import METHODS, ranking, run_choices

    records = [
        record
        for record in records_of(read_sweep(folder))
        if (record.dataset, record.algorithm) == (dataset, algorithm) and test_env in record.test_envs
    ]
    if not records:
        raise NotFoundError(f"{folder} has no run of {algorithm} on {dataset} that holds out domain {test_env}.")
    found = []
    for method in selection or tuple(METHODS):
        for trial in sorted({record.trial_seed for record in records}):
            choices = run_choices([record for record in records if record.trial_seed == trial], method)
            found += [
                {
                    "selection": method,
                    "trial": trial,
                    "hparams_seed": choice.hparams_seed,
                    "validation": accuracy.val,
                    "test": accuracy.test,
                    "step": accuracy.step,
                    "hparams": dict(choice.hparams),
                }
                for choice, accuracy in ranking(choices)
            ]
    if json:
        console.emit_json({"dataset": dataset, "algorithm": algorithm, "test_env": test_env, "choices": found})
        return
    names = ("selection", "trial", "hparams_seed", "validation", "test", "step")
    rows = [tuple(f"{row[n]:.4f}" if isinstance(row[n], float) else str(row[n]) for n in names) for row in found]
    console.show_table(tuple(name.replace("_", " ") for name in names), rows)


@app.command()
def export(
    run: opt.RunId,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The sweep's folder; made when missing.")],
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Write the finished runs of a sweep for DomainBed's own scripts. What has ended in FOLDER stays."""
    from moe.errors import NotFoundError
    from orchestrator import console
    from orchestrator.cli_read import view_of
    from orchestrator.runs import RunStore
    from orchestrator.store import Store
    from workers.domainbed.takeover import export_runs

    opened = Store.open(store)
    view = view_of(RunStore(opened).open(run))
    artifacts = [opened.artifact(node.artifact) for node in view.nodes.values() if node.artifact]
    runs = [artifact for artifact in artifacts if artifact.kind == "run"]
    if not runs:
        raise NotFoundError(
            f"{run} has no finished run of a sweep.", "Only `sweep` stages make them; wait for one to finish."
        )
    written, kept = export_runs(((a.meta["args"], opened.local_path(a)) for a in runs), folder)
    if json:
        console.emit_json({"folder": str(folder), "written": written, "kept": kept})
        return
    console.say(f"{folder}: {written} runs written, {kept} had ended there already and stay as they are.")
