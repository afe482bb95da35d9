"""The tables of a sweep, in every form that people ask for, with the figures and one HTML page."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe.errors import DataError
from workers.context import Context, Input
from workers.domainbed.figures import accuracy_points, learning_curves, routing_maps
from workers.domainbed.jobs import named_run
from workers.domainbed.records import Record, read_run
from workers.domainbed.report import Report, collect
from workers.domainbed.routing import ATTENTION, ROUTING
from workers.domainbed.selection import METHODS
from workers.domainbed.tables import grid_of, render
from workers.domainbed.takeover import export_runs
from workers.report_page import Figure, fill_template

FORMS = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "html": "html"}
SWEEP_FOLDER = "sweep"


def write_tables(config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Write ``tables.*``, the figures, ``report.html`` and the runs in the public code's layout (``sweep/``).

    Args:
        config: fields of the ``domainbed_tables`` stage.
        context: its port ``runs`` holds the runs that succeeded.

    Raises:
        DataError: no runs, runs of several protocols, or damaged records.
    """
    runs = context.inputs["runs"]
    if not runs:
        raise DataError("There is no run to make tables from.", "Wire a `sweep` stage to the input `runs`.")
    records = [record for artifact in runs for record in read_run(artifact.path).records]
    missing = missing_runs(context.left_out.get("runs", ()))
    labels = {str(a.meta["args"]["dataset"]): list(a.meta["labels"]) for a in runs if "labels" in a.meta}
    report = collect(records, config["selection"], labels, missing)
    report, empty = _filled(_asked(report, runs, missing))
    settings = _settings(runs)
    notes = [_note(key, labels, missing[key]) for key in missing] + empty
    head = [str(config["title"]), *(f"{name}: {value}" for name, value in settings.items())]
    for form, ending in FORMS.items():
        text = render(report, form)  # type: ignore[arg-type]
        (context.output / f"tables.{ending}").write_text(_commented(form, head, text, notes))
    figures = {**_figures(report, records), **_routing_figures(runs)}
    for name, figure in figures.items():
        (context.output / f"{name}.png").write_bytes(figure.png)
    page = {**config, "figures": list(figures.values())}
    merged = _merged_table(runs, labels)
    shown = [_shown(table) for table in report.tables] + ([merged] if merged else [])
    html = fill_template("benchmark.html.j2", page=page, tables=shown, notes=notes, settings=list(settings.items()))
    (context.output / "report.html").write_text(html)
    export_runs(((artifact.meta["args"], artifact.path) for artifact in runs), context.output / SWEEP_FOLDER)
    context.log("\n" + render(report, "text"))
    if merged:
        (context.output / "merged.json").write_text(json.dumps(merged, indent=1, sort_keys=True))
    for note in notes:
        context.log(note)
    scores = headline(report)
    context.metrics(scores)
    (context.output / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True))
    return {"title": config["title"], "runs": len(runs), "incomplete": notes, "scores": scores}


def _asked(report: Report, runs: Sequence[Input], missing: Iterable[tuple[str, str, int]]) -> Report:
    """Without the columns of domains that no run was asked to hold out."""
    asked: dict[str, set[int]] = {}
    for dataset, _, domain in missing:
        asked.setdefault(dataset, set()).add(domain)
    for artifact in runs:
        args = artifact.meta["args"]
        asked.setdefault(args["dataset"], set()).update(args["test_envs"])
    tables = []
    for table in report.tables:
        kept = [number for number in range(len(table.columns)) if number in asked.get(table.dataset, {number})]
        rows = [replace(row, cells=tuple(row.cells[number] for number in kept)) for row in table.rows]
        tables.append(replace(table, columns=tuple(table.columns[number] for number in kept), rows=tuple(rows)))
    return Report(tuple(tables), report.records)


def _filled(report: Report) -> tuple[Report, list[str]]:
    """Without the selection methods that have selected nothing; a note for each of them."""
    kept, notes = [], []
    for method in dict.fromkeys(table.method for table in report.tables):
        own = [table for table in report.tables if table.method == method]
        if any(any(row.cells) for table in own for row in table.rows):
            kept += own
        else:
            needs = "runs with pairs of held-out domains" if method == "loo" else "runs with one held-out domain"
            notes.append(f"No table by {METHODS[method].title}: it needs {needs}.")
    return Report(tuple(kept), report.records), notes


def headline(report: Report) -> dict[str, float]:
    """Mean accuracy in per cent of each algorithm: ``iid/PACS/ERM``."""
    found = {}
    for table in report.tables:
        for row in table.rows:
            if table.dataset and row.average is not None and not math.isnan(row.average):
                found[f"{table.method}/{table.dataset}/{row.algorithm}".replace("+", "_")] = round(row.average, 4)
    return found


def missing_runs(left_out: Iterable[str]) -> dict[tuple[str, str, int], int]:
    """(Data set, algorithm, held-out domain) -> runs with one held-out domain that failed; ``left_out`` names all."""
    named = [named_run(name) for name in left_out]
    return dict(Counter((dataset, method, held_out[0]) for dataset, method, held_out in named if len(held_out) == 1))


def _settings(runs: Sequence[Input]) -> dict[str, str]:
    """What must stand beside every number: protocol, budget, number of trials and seeds."""
    own = [artifact.meta for artifact in runs if not artifact.meta.get("taken_over")]
    protocols = sorted({str(meta["protocol"]) for meta in own})
    if len(protocols) > 1:
        raise DataError(
            f"These runs follow different protocols: {', '.join(protocols)}.", "Make one table for each of them."
        )
    steps = sorted({int(artifact.meta["steps"]) for artifact in runs})
    args = [artifact.meta["args"] for artifact in runs]
    found = {
        "protocol": protocols[0] if protocols else "as in the folder that was extended",
        "updates": ", ".join(map(str, steps)),
        "trials": str(len({entry["trial_seed"] for entry in args})),
        "hyper-parameter seeds": str(len({entry["hparams_seed"] for entry in args})),
        "runs": str(len(runs)),
    }
    if own:
        found["evaluation"] = ", ".join(sorted({str(meta["evaluation"]) for meta in own}))
        found["precision"] = ", ".join(sorted({str(meta["precision"]) for meta in own}))
    if len(own) < len(runs):
        found["taken over"] = f"{len(runs) - len(own)} runs of another folder"
    return found


def _note(key: tuple[str, str, int], labels: Mapping[str, Sequence[str]], count: int) -> str:
    dataset, algorithm, domain = key
    label = labels[dataset][domain] if dataset in labels else f"env{domain}"
    return f"* {dataset}, {algorithm}, {label} held out: {count} run{'s' if count > 1 else ''} missing"


def _commented(form: str, head: Sequence[str], text: str, notes: Sequence[str]) -> str:
    """The tables with title, settings and footnotes around them; CSV stays bare for programs."""
    if form == "csv":
        return text
    if form == "html":
        return f"<p>{'<br>'.join(head)}</p>\n{text}" + "".join(f"<p>{note}</p>\n" for note in notes)
    mark = {"text": "", "markdown": "", "latex": "% "}[form]
    gap = "  \n" if form == "markdown" else "\n"
    return gap.join(mark + line for line in head) + "\n" + text + "".join(f"\n{mark}{note}" for note in notes)


def _shown(table: Any) -> dict[str, Any]:
    header, *body = grid_of(table)
    caption = f"Model selection: {METHODS[table.method].title}. Accuracy in %, mean ± standard error over trials."
    return {"title": table.title, "caption": caption, "header": header, "body": body}


def _merged_table(runs: Sequence[Input], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """EMoE's selected networks before and after their experts are put back; empty without any."""
    cells: dict[tuple[str, str, int], list[tuple[float, float, float]]] = {}
    for artifact in runs:
        args, merged = artifact.meta["args"], artifact.meta.get("merged")
        if merged and len(args["test_envs"]) == 1:
            key = f"env{args['test_envs'][0]}_in_acc"
            pair = (100 * merged["before"][key], 100 * merged["after"][key], merged["residual"])
            cells.setdefault((args["dataset"], args["algorithm"], args["test_envs"][0]), []).append(pair)
    if not cells:
        return {}
    body = []
    for (dataset, algorithm, domain), pairs in cells.items():
        before, after, residual = np.mean(pairs, axis=0)
        name = labels[dataset][domain] if dataset in labels else f"env{domain}"
        body.append(
            [algorithm, dataset, name, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}", f"{residual:.1e}"]
        )
    return {
        "title": "Merged back to dense",
        "caption": "Held-out accuracy in % of the selected networks, with their experts and as plain dense networks.",
        "header": ["Algorithm", "data set", "held out", "experts", "merged", "difference", "bias residual"],
        "body": body,
    }


def _figures(report: Report, records: Sequence[Record]) -> dict[str, Figure]:
    found = {}
    first = report.tables[0].method if report.tables else ""
    for table in report.tables:
        if table.dataset and table.method == first and any(any(row.cells) for row in table.rows):
            found[f"accuracy_{table.dataset}"] = Figure(
                f"{table.dataset}: held-out domains",
                f"Accuracy on each domain when it is held out; {METHODS[table.method].title}.",
                accuracy_points(table),
            )
            found[f"training_{table.dataset}"] = Figure(
                f"{table.dataset}: training",
                "Mean accuracy on `out` of the training domains; bands span the runs.",
                learning_curves(records, table.dataset),
            )
    return found


def _routing_figures(runs: Sequence[Input]) -> dict[str, Figure]:
    """Routing by domain and class for each data set and algorithm, and the attention of one run of each."""
    groups: dict[tuple[str, str], list[Input]] = {}
    for artifact in runs:
        args = artifact.meta["args"]
        groups.setdefault((str(args["dataset"]), str(args["algorithm"])), []).append(artifact)
    found = {}
    for (dataset, name), own in groups.items():
        files = [artifact.path / ROUTING for artifact in own if (artifact.path / ROUTING).is_file()]
        stem = f"{dataset}_{name}"
        if files:
            read = [json.loads(file.read_text()) for file in files]
            tables = [entry["layers"] for entry in read]
            first = next(iter(tables[0].values()))
            for group, noun in (("by_domain", "domain"), ("by_class", "class")):
                found[f"routing_{stem}_{noun}"] = Figure(
                    f"{name} on {dataset}: which {noun} goes to which expert",
                    f"Share of the tokens of each {noun}, mean over {len(files)} runs. Shared information is 0 when "
                    "routing does not depend on it, 1 when it decides.",
                    routing_maps(tables, group, first[group]["names"]),
                )
        looks = [artifact.path / ATTENTION for artifact in own if (artifact.path / ATTENTION).is_file()]
        if looks:
            found[f"attention_{stem}"] = Figure(
                f"{name} on {dataset}: where the class token looks",
                "First image of each domain, and the last block's attention to its patches (mean over heads).",
                looks[0].read_bytes(),
            )
    return found
