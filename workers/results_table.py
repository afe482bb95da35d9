"""One table over several seeds: mean ± standard deviation, and signed adaptation gains with their spread.

A gain is a paired difference within one seed (the same model with and without adaptation), so its spread over seeds is
much smaller than that of the scores. Near zero or negative gains are results and are printed like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe.errors import DataError
from workers.evaluation_result import EvaluationResult, order_of

# Metrics that are not shares: printed as they are, with three decimals.
_PLAIN = ("pearson", "mse", "r_")


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over the seeds that have the value; ``std`` is None for a single seed."""

    mean: float
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Column:
    """A column: ``key`` is a metric, ``domain_mean``, ``domain_worst`` or ``gain``."""

    key: str
    title: str
    percent: bool
    signed: bool = False


@dataclass(frozen=True)
class Row:
    """A method with one cell per column; None where it has no such value."""

    name: str
    label: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """Rendered by :meth:`text` and :meth:`markdown`."""

    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def cell(self, method: str, key: str) -> Cell | None:
        """The cell of a method in the column ``key``; None when absent."""
        index = [column.key for column in self.columns].index(key)
        return next((row.cells[index] for row in self.rows if row.name == method), None)

    def strings(self) -> tuple[list[str], list[list[str]]]:
        """Header and body as text."""
        header = ["method", *(column.title for column in self.columns)]
        body = [
            [row.label, *(_show(cell, column) for cell, column in zip(row.cells, self.columns, strict=True))]
            for row in self.rows
        ]
        return header, body

    def text(self) -> str:
        """Aligned plain text with title and notes."""
        header, body = self.strings()
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines = [self.title, ""]
        for line in [header, ["-" * width for width in widths], *body]:
            cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])]) + "\n"

    def markdown(self) -> str:
        """A Markdown table with title and notes."""
        header, body = self.strings()
        lines = [f"**{self.title}**", "", "| " + " | ".join(header) + " |"]
        lines.append("|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|")
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body]
        return "\n".join([*lines, *(["", *(f"{note}  " for note in self.notes)] if self.notes else [])]) + "\n"


def combine(results: Sequence[EvaluationResult]) -> Table:
    """The table over seeds of one data set and protocol.

    Raises:
        DataError: no results, or they are of different data sets, protocols or splits.
    """
    if not results:
        raise DataError("There are no evaluations to combine.", "Give at least one.")
    kinds = {(r.dataset, r.protocol, r.split, r.metric) for r in results}
    if len(kinds) > 1:
        raise DataError(
            f"Evaluations of different kinds cannot be averaged: {sorted(kinds)}.", "Combine one kind at a time."
        )
    first = results[0]
    columns = _columns(first)
    rows = [_row(name, label, columns, results) for name, label in order_of(results)]
    seeds = sorted({result.seed for result in results})
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    return Table(
        f"{first.title} ({first.split}, {first.protocol} protocol, {count})", columns, rows, _notes(results, seeds)
    )


def _columns(result: EvaluationResult) -> list[Column]:
    metrics = [result.metric, *(name for name in result.methods[0].scores if name != result.metric)]
    columns = [Column(name, name.replace("_", " "), _is_share(name)) for name in metrics]
    share = result.task != "regression"
    if len(result.domains) == 1:  # the mean and the worst of one domain say nothing new
        columns = [column for column in columns if not column.key.startswith("worst_domain")]
        return [*columns, _gain(result)]
    if "mean_of_domain_accuracies" not in metrics:
        columns.append(Column("domain_mean", "mean of domains", share))
    if not {"worst_domain_accuracy", "worst_domain_pearson_r"} & set(metrics):
        columns.append(Column("domain_worst", "worst domain", share))
    return [*columns, _gain(result)]


def _gain(result: EvaluationResult) -> Column:
    return Column("gain", f"gain ({result.metric.replace('_', ' ')})", _is_share(result.metric), signed=True)


def _row(name: str, label: str, columns: Sequence[Column], results: Sequence[EvaluationResult]) -> Row:
    found = [method for result in results for method in result.methods if method.name == name]
    metric = results[0].metric
    cells: list[Cell | None] = []
    for column in columns:
        if column.key == "gain":
            values = [m.gains[metric].value for m in found if m.gains]
        elif column.key in ("domain_mean", "domain_worst"):
            values = [float(getattr(m, column.key)) for m in found]
        else:
            values = [m.scores[column.key] for m in found if column.key in m.scores]
        cells.append(_cell(values))
    return Row(name, label, cells)


def _notes(results: Sequence[EvaluationResult], seeds: Sequence[int]) -> list[str]:
    first = results[0]
    support = " or ".join(map(str, sorted({result.support_size for result in results})))
    scored = " or ".join(map(str, sorted({sum(result.counts) for result in results})))
    adapted = {
        "official": f"Adapted on the first {support} images of each domain, which are scored as well.",
        "split": f"Adapted on up to {support} unlabelled images of each domain, scored on others.",
    }
    return [
        f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds. "
        f"{len(first.domains)} domain{'s' * (len(first.domains) != 1)}, {scored} scored images.",
        adapted.get(first.protocol, ""),
        "Gain: difference to the same model without adaptation, paired within each seed.",
    ]


def _cell(values: Sequence[float]) -> Cell | None:
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), std, len(values))


def _is_share(metric: str) -> bool:
    return not any(metric.startswith(start) or f"_{start}" in metric for start in _PLAIN)


def _show(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return "–"
    scale, digits = (100, 1) if column.percent else (1, 3)
    sign = "+" if column.signed else ""
    spread = "" if cell.std is None else f" ± {cell.std * scale:.{digits}f}"
    return f"{cell.mean * scale:{sign}.{digits}f}{spread}"
