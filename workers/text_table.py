"""The table of a text search, over seeds: in domain, out of domain, average rank; as text, Markdown, LaTeX and CSV.

Parity: means over seeds with population standard deviations, in percent, and Friedman's average rank of the methods
over the sets out of domain (EMoE, arXiv 2310.10908, section 4).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe.errors import DataError
from workers.glue import friedman_ranks
from workers.results_table import Cell, Column, Row, Table

FORM_LABELS = {"trained": "", "merged": ", merged", "split": ", split at test"}
Evaluation = Mapping[str, Any]


def rows_of(evaluations: Sequence[Evaluation]) -> list[tuple[str, str, str, Evaluation]]:
    """(key, label, form, evaluation) of every line, by tuning and method as they come."""
    found = []
    for evaluation in evaluations:
        for form in ("trained", "split", "merged"):
            if form in evaluation["results"]:
                key = f"{evaluation['method']} {evaluation['tuning']} {form}"
                tuning = "LoRA" if evaluation["tuning"] == "lora" else "full"
                found.append((key, f"{evaluation['label']}{FORM_LABELS[form]} ({tuning})", form, evaluation))
    return found


def build_table(evaluations: Sequence[Evaluation]) -> Table:
    """One line per method, tuning and form.

    Raises:
        DataError: no evaluations, or they are of different texts.
    """
    if not evaluations:
        raise DataError("There are no evaluations to report.", "Wire a text_evaluate stage to `evaluations`.")
    if len({(e["dataset"], e["selection"], tuple(sorted(e["metrics"]))) for e in evaluations}) > 1:
        raise DataError("These evaluations are of different texts.", "Report one data set at a time.")
    first = evaluations[0]
    ood = ood_sets(first)
    columns = [Column(f"validation/{m}", m.replace("_", " "), True) for m in first["metrics"]["validation"]]
    columns += [Column(name, f"OOD {name.removeprefix('ood:')}", True) for name in ood]
    if len(ood) > 1:
        columns.append(Column("ood", "OOD mean", True))
    columns.append(Column("rank", "OOD rank", False))
    columns.append(Column("residual", "merge residual", False))
    ranks = ranks_of(evaluations, ood)
    rows = []
    for key, label, form, evaluation in rows_of(evaluations):
        cells = [_cell(key, form, evaluation, column, ood, ranks) for column in columns]
        rows.append(Row(key, label, cells))
    seeds = sorted({seed for e in evaluations for seed in e["selected"]["seeds"]})
    title = f"{first['title']}: {len(seeds)} seed{'s' * (len(seeds) != 1)}, selection {first['selection']}"
    return Table(title, columns, rows, [*_notes(first, ood, seeds), _chosen(evaluations)])


def ood_sets(evaluation: Evaluation) -> list[str]:
    """Names of the splits out of domain, in order."""
    return [name for name in evaluation["metrics"] if name.startswith("ood:")]


def averages(evaluation: Evaluation, form: str, split: str) -> list[float]:
    """The split's average metric of every seed, in the order of the seeds."""
    seeds = evaluation["results"][form]
    return [seeds[str(seed)][split]["average"] for seed in evaluation["selected"]["seeds"]]


def ranks_of(evaluations: Sequence[Evaluation], ood: Sequence[str]) -> dict[str, float]:
    """Average rank of each line among the trained lines of its kind of tuning, over the sets out of domain."""
    ranks: dict[str, float] = {}
    for tuning in {e["tuning"] for e in evaluations}:
        lines = [row for row in rows_of(evaluations) if row[3]["tuning"] == tuning and row[2] == "trained"]
        scores = {key: [float(np.mean(averages(e, form, name))) for name in ood] for key, _, form, e in lines}
        if len(scores) > 1 and ood:
            ranks |= friedman_ranks(scores)
    return ranks


def incomplete(evaluations: Sequence[Evaluation]) -> list[str]:
    """What is missing: candidates and methods with fewer seeds than others."""
    most = max((len(e["selected"]["seeds"]) for e in evaluations), default=0)
    notes = []
    for e in evaluations:
        name = f"{e['label']} ({e['tuning']})"
        seeds = e["selected"]["seeds"]
        if len(seeds) < most:
            notes.append(f"{name}: {len(seeds)} of {most} seeds.")
        notes += [
            f"{name}: rate {c['lr']:g} has {c['seeds']} of {len(seeds)} seeds and took no part in the choice."
            for c in e["candidates"]
            if not c["complete"]
        ]
    return notes


def latex(table: Table) -> str:
    """A ``tabular`` (booktabs) with title and notes as comments."""
    header, body = table.strings()
    lines = [f"% {line}" for line in [table.title, *table.notes] if line]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", "\\toprule"]
    lines += [_latex_line(header), "\\midrule", *map(_latex_line, body), "\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """One line per cell: method, column, mean, standard deviation, seeds; numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "column", "mean", "std", "seeds"])
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is not None:
                writer.writerow([row.name, column.key, cell.mean, "" if cell.std is None else cell.std, cell.seeds])
    return buffer.getvalue()


def _cell(
    key: str, form: str, evaluation: Evaluation, column: Column, ood: Sequence[str], ranks: Mapping[str, float]
) -> Cell | None:
    selected, kind = evaluation["selected"], column.key
    if kind == "rank":
        return Cell(ranks[key], None, len(selected["seeds"])) if key in ranks else None
    if kind == "residual":
        return _mean(list(evaluation["residual"].values()), False) if form == "merged" else None
    if kind.startswith("validation/"):
        seeds = evaluation["results"][form]
        return _mean([seeds[str(s)]["validation"][kind.removeprefix("validation/")] for s in selected["seeds"]])
    if kind == "ood":
        return _mean(np.mean([averages(evaluation, form, name) for name in ood], axis=0).tolist())
    return _mean(averages(evaluation, form, kind))


def _mean(values: Sequence[float], spread: bool = True) -> Cell:
    std = float(np.std(values)) if spread and len(values) > 1 else None
    return Cell(float(np.mean(values)), std, len(values))


def _notes(first: Evaluation, ood: Sequence[str], seeds: Sequence[int]) -> list[str]:
    rows = ", ".join(f"{name} {first['rows'][name]}" for name in ("train", "selection", "validation", *ood))
    rule = {
        "official": "The validation rows select epoch and rate and are reported, as published.",
        "held_out": "Training rows set apart select epoch and rate.",
    }[first["selection"]]
    metrics = sorted({" and ".join(first["metrics"][name]) for name in ood})
    return [
        f"Seeds {', '.join(map(str, seeds))}; mean ± population standard deviation. {rule}",
        f"Rows: {rows}. OOD columns: mean of {'; '.join(metrics).replace('_', ' ')}." if ood else f"Rows: {rows}.",
        "OOD rank: average rank among the methods of one tuning, 1 is best (Friedman).",
    ]


def _chosen(evaluations: Sequence[Evaluation]) -> str:
    """The rate and budget of each method."""
    told = []
    for e in evaluations:
        selected, steps = e["selected"], sorted(set(e["steps"].values()))
        size = f", {selected['top_k']} of {selected['num_experts']} experts" if selected["num_experts"] else ""
        updates = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        told.append(f"{e['label']} {e['tuning']} {selected['lr']:g}{size}, {updates} updates")
    return f"Chosen rates: {'; '.join(told)}."


def _latex_line(cells: Sequence[str]) -> str:
    return (
        " & ".join(
            c.replace("&", "\\&").replace("%", "\\%").replace("_", "\\_").replace("±", "$\\pm$").replace("–", "--")
            for c in cells
        )
        + " \\\\"
    )
