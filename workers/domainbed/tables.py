"""Result tables as text, Markdown, LaTeX, CSV and HTML.

Text and LaTeX with ``compat`` are DomainBed's, byte by byte: columns of a fixed width to which cells are cut, which in
LaTeX costs long header cells their closing brace. Without it nothing is cut, LaTeX is escaped, tables over domains
have a column for the worst one, and a single trial is given without an error.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

from moe.errors import SpecError, nearest
from workers.domainbed.report import Cell, Report, Table
from workers.domainbed.selection import METHODS

Format = Literal["text", "markdown", "latex", "csv", "html"]

_WIDTH, _AVERAGES_WIDTH = 20, 25
_MISSING = "X"
_LATEX = str.maketrans(
    {**{sign: f"\\{sign}" for sign in "%_&#${}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)


def render(report: Report, form: Format, *, compat: bool = False) -> str:
    """All tables in one text.

    Args:
        report: see :func:`workers.domainbed.report.collect`.
        form: ``text``, ``markdown``, ``latex``, ``csv`` (one line per cell) or ``html`` (a fragment).
        compat: exactly as the public code prints it; for text and LaTeX.

    Raises:
        SpecError: unknown format, or one that the public code does not have.
    """
    if form not in _FORMATS:
        raise SpecError(f"There is no format {form!r}.", nearest(form, _FORMATS))
    if compat and form not in ("text", "latex"):
        raise SpecError(f"The public code does not print {form}.", "Use compat with text or latex.")
    return _FORMATS[form](report, compat)


def _text(report: Report, compat: bool) -> str:
    lines: list[str] = []
    for table in report.tables:
        name = f"Dataset: {table.dataset}" if table.dataset else "Averages"
        lines += ["", f"-------- {name}, model selection method: {METHODS[table.method].title}"]
        grid = grid_of(table, "+/-", compat=compat)
        widths = _widths(grid, table, compat)
        lines += [_line(row, widths, "  ", " ") for row in grid]
    return "\n".join(lines) + "\n"


def _latex(report: Report, compat: bool) -> str:
    lines: list[str] = []
    method = ""
    for table in report.tables:
        if table.method != method and not compat:
            lines += ["", f"% model selection method: {METHODS[table.method].title}"]
        method = table.method
        title = table.title if compat else table.title.translate(_LATEX)
        lines += ["", f"\\subsubsection{{{title}}}", "", r"\begin{center}", r"\adjustbox{max width=\textwidth}{%"]
        grid = grid_of(table, r"$\pm$", compat=compat)
        names = [[name.replace("%", r"\%") if compat else name.translate(_LATEX) for name in grid[0]]]
        if not compat:
            grid = [[row[0].translate(_LATEX), *row[1:]] for row in grid]
        grid = [[f"\\textbf{{{name}}}" for name in names[0]], *grid[1:]]
        widths = _widths(grid, table, compat)
        rows = [_line(row, widths, " & ", r" \\") for row in grid]
        lines += [f"\\begin{{tabular}}{{l{'c' * (len(grid[0]) - 1)}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{center}"]
    return "\n".join(lines) + "\n"


def _markdown(report: Report, compat: bool) -> str:
    lines: list[str] = []
    for table in report.tables:
        lines += [f"**{_caption(table)}**", ""]
        header, *body = [[cell.replace("|", r"\|") for cell in row] for row in grid_of(table)]
        rows = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _html(report: Report, compat: bool) -> str:
    lines: list[str] = []
    for table in report.tables:
        header, *body = grid_of(table)
        lines += ["<table>", f"<caption>{escape(_caption(table))}</caption>"]
        lines.append(
            "<thead><tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in header) + "</tr></thead>"
        )
        lines.append("<tbody>")
        for name, *cells in body:
            values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{values}</tr>')
        lines += ["</tbody>", "</table>"]
    return "\n".join(lines) + "\n"


def _csv(report: Report, compat: bool) -> str:
    """One line per cell, unrounded; missing values and the error of a single trial are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["selection", "dataset", "algorithm", "domain", "mean", "standard_error", "trials"])
    for table in report.tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                dataset, domain = (table.dataset, column) if table.dataset else (column, "Avg")
                mean, trials = ("", 0) if cell is None else (cell.mean, cell.trials)
                error = cell.error if cell is not None and trials > 1 else ""
                writer.writerow([table.method, dataset, row.algorithm, domain, mean, error, trials])
    return buffer.getvalue()


_FORMATS: dict[str, Callable[[Report, bool], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
    "html": _html,
}


def _caption(table: Table) -> str:
    """Title, method and number of trials."""
    trials = sorted({cell.trials for row in table.rows for cell in row.cells if cell is not None})
    span = f"{trials[0]}-{trials[-1]}" if len(trials) > 1 else "".join(map(str, trials)) or "0"
    noun = "trial" if span == "1" else "trials"
    return f"{table.title}, model selection: {METHODS[table.method].title}, {span} {noun}"


def grid_of(table: Table, sign: str = "±", *, compat: bool = False) -> list[list[str]]:
    """Header and rows as texts.

    Args:
        table: one table of a report.
        sign: between a mean and its standard error.
        compat: as the public code: no worst domain, and a single trial has an error of 0.0 instead of none.
    """
    last = ["Avg"] if compat or not table.dataset else ["Avg", "Worst"]
    grid = [["Algorithm", *table.columns, *last]]
    for row in table.rows:
        ends = [row.average, row.worst][: len(last)]
        cells = [_show(cell, sign, compat) for cell in row.cells]
        grid.append([row.algorithm, *cells, *(_MISSING if end is None else f"{end:.1f}" for end in ends)])
    return grid


def _show(cell: Cell | None, sign: str, compat: bool) -> str:
    if cell is None:
        return _MISSING
    error = f" {sign} {cell.error:.1f}" if compat or cell.trials > 1 else ""
    return f"{cell.mean:.1f}{error}{'*' if cell.missing else ''}"


def _widths(grid: Sequence[Sequence[str]], table: Table, compat: bool) -> list[int]:
    width = _WIDTH if table.dataset else _AVERAGES_WIDTH
    if compat:
        return [width] * len(grid[0])
    return [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]


def _line(cells: Sequence[str], widths: Sequence[int], between: str, end: str) -> str:
    return between.join(cell.ljust(width)[:width] for cell, width in zip(cells, widths, strict=True)) + end
