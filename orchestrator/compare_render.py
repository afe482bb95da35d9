"""A comparison as text for people: terminal, Markdown and LaTeX; also the tables of :mod:`orchestrator.compare_page`.

Scores are per cent, mean ± standard error over seeds; a dash means that something was not recorded, and a note says
why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.compare import AVERAGE, WORST, Cell, Comparison, Row, letter, level_words

DASH = "–"
TERMINAL_DOMAINS = 6
TERMINAL_ROWS = 60
_TITLES = {AVERAGE: "average", WORST: "worst domain"}


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column is left-aligned, ``marked`` are the rows of the baseline."""

    title: str
    header: list[str]
    body: list[list[str]]
    marked: list[int]


def grids(found: Comparison, domains: bool = True) -> list[Grid]:
    """Two tables: scores, and what they cost.

    Args:
        found: the comparison.
        domains: with a column for each domain.
    """
    marked = [number for number, row in enumerate(found.rows) if row.baseline]
    scores = _columns(found, _score_columns(found, domains))
    costs = _columns(found, _cost_columns(found))
    title = found.settings[0].title if len(found.settings) == 1 else "different settings"
    return [Grid(f"Scores: {title}", *scores, marked), Grid("Costs", *costs, marked)]


Column = tuple[str, Callable[[Row], str]]


def _columns(found: Comparison, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    return [title for title, _ in columns], [[text(row) for _, text in columns] for row in found.rows]


def _score_columns(found: Comparison, domains: bool) -> list[Column]:
    columns: list[Column] = [("method", lambda row: row.label)]
    if len(found.selections) > 1:
        columns.append(("selected by", lambda row: row.selection))
    single = len(found.domains) == 1
    columns.append((found.domains[0] if single else "average", lambda row: score(row.cell(AVERAGE), row)))
    if not single:
        columns.append(("worst domain", lambda row: score(row.cell(WORST), row)))
        columns.append(("which", lambda row: row.worst_name))
    if found.options.metric not in (AVERAGE, WORST):
        name = found.options.metric
        columns.append((name.replace("_", " "), lambda row: score(row.cell(name), row)))
    if found.baseline:
        columns.append((f"against {found.baseline}", difference))
    columns.append(("seeds", lambda row: str(len(row.seeds))))
    if domains and len(found.domains) > 1:
        columns += [(name, lambda row, name=name: score(row.domain(name), row)) for name in found.domains]  # type: ignore[misc]
    return columns


def _cost_columns(found: Comparison) -> list[Column]:
    watts = found.options.watts
    columns: list[Column] = [
        ("method", lambda row: row.label),
        ("parameters", lambda row: count(row.cost.parameters)),
        ("used by an image", lambda row: count(row.cost.active_parameters)),
        ("FLOPs of an image", lambda row: count(row.cost.flops)),
        ("latency", lambda row: DASH if row.cost.latency_ms is None else f"{row.cost.latency_ms:.2f} ms"),
        ("training", hours),
        ("energy", lambda row: energy(row, watts)),
        ("updates", lambda row: ", ".join(map(str, row.steps)) or DASH),
    ]
    if len(found.runs) > 1:
        columns.append(("runs", lambda row: _runs(row)))
    return columns


def _runs(row: Row) -> str:
    names = [run.rsplit("-", 1)[-1] for run in row.runs]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def score(cell: Cell | None, row: Row) -> str:
    """A score: per cent with one digit, or with three digits where it is no share."""
    if cell is None:
        return DASH
    scale, digits = (100, 1) if row.percent else (1, 3)
    error = "" if cell.error is None else f" ± {scale * cell.error:.{digits}f}"
    return f"{scale * cell.mean:.{digits}f}{error}"


def difference(row: Row) -> str:
    """The paired difference with its interval and mark."""
    found = row.difference
    if row.baseline:
        return "baseline"
    if found is None:
        return DASH
    scale, digits = (100, 1) if row.percent else (1, 3)
    mean = f"{scale * found.mean:+.{digits}f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean}{found.mark} [{scale * found.low:+.{digits}f}, {scale * found.high:+.{digits}f}]"


def count(value: float | None) -> str:
    """A number of parameters or operations: ``82.5 k``, ``1.2 M``."""
    if value is None:
        return DASH
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def hours(row: Row) -> str:
    """Device-hours of one model."""
    found = row.hours
    if found is None:
        return DASH
    least = "≥ " if found.missing else ""
    return f"{least}{found.hours:.3g} {found.device}-h"


def energy(row: Row, watts: float | None) -> str:
    """Estimate from device-hours."""
    if watts is None or row.hours is None:
        return DASH
    return f"≈ {row.hours.hours * watts:.3g} Wh"


def notes(found: Comparison) -> list[str]:
    """What must be said beside the numbers, the reasons of the dashes included."""
    told = [f"{letter(number)}: {setting.title}" for number, setting in enumerate(found.settings)]
    lines = told if len(told) > 1 else []
    lines += found.notes
    lines.append(
        f"{len(found.runs)} run{'s' * (len(found.runs) != 1)}, {len(found.rows)} rows. Scores in per cent, mean ± "
        "standard error over seeds; the worst domain is each seed's own."
    )
    rules = {"iid": "on training domains", "loo": "leave one domain out", "oracle": "on the test domain (not allowed)"}
    said = [f"{name} ({rules[name]})" if name in rules else name for name in found.selections]
    lines.append(f"Models selected by: {', '.join(said)}.")
    lines += _difference_notes(found) + _dashes(found)
    return lines


def _difference_notes(found: Comparison) -> list[str]:
    if not found.baseline:
        return ["No baseline: --baseline NAME tests every row against a row or a run."]
    levels = list(dict.fromkeys(row.difference.level for row in found.rows if row.difference))
    if not levels:
        return ["No row could be paired with the baseline."]
    words = "; ".join(level_words(level) for level in levels if level != "none")
    lines = []
    if words:
        lines.append(
            f"Differences ({_TITLES.get(found.options.metric, found.options.metric)}) are paired, with 95% bootstrap "
            f"intervals over {words}; * p < 0.05, ** p < 0.01 after Holm's correction over the rows."
        )
    if "none" in levels:
        lines.append("Differences without an interval: fewer than 5 seeds and no stored predictions or domains.")
    if any(row.difference and row.difference.seeds == 1 for row in found.rows):
        lines.append("One seed: its intervals say nothing about training again.")
    return lines


def _dashes(found: Comparison) -> list[str]:
    lines = []
    lacks = {
        "parameters and FLOPs": [row for row in found.rows if row.cost.parameters is None or row.cost.flops is None],
        "latency": [row for row in found.rows if row.cost.latency_ms is None],
        "training time": [row for row in found.rows if row.hours is None],
    }
    for what, rows in lacks.items():
        if rows:
            which = "" if len(rows) == len(found.rows) else f" of {len(rows)} rows"
            lines.append(f"{DASH} {what}{which}: the stage did not record it (evaluations made by this version do).")
    if found.options.watts is None:
        lines.append(f"{DASH} energy: no power is metered; --watts W estimates it from device-hours.")
    else:
        lines.append(f"Energy: estimate, device-hours times {found.options.watts:g} W.")
    if any(row.hours and row.hours.missing for row in found.rows):
        lines.append("≥: the time of some members is no longer known.")
    if any(row.hours for row in found.rows):
        lines.append("Training: device-hours of one model and all that it was made from, hits included.")
    return lines


# ---- forms ----


def markdown(found: Comparison, domains: bool = True) -> str:
    """Two tables and notes."""
    lines = []
    for grid in grids(found, domains):
        cells = [[cell.replace("|", "\\|") for cell in line] for line in [grid.header, *grid.body]]
        lines += [f"**{grid.title}**", "", "| " + " | ".join(cells[0]) + " |"]
        lines += ["|" + "|".join(["---", *["---:"] * (len(grid.header) - 1)]) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in cells[1:]]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes(found))]) + "\n"


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
}


def latex(found: Comparison, domains: bool = True) -> str:
    """Two ``tabular`` environments for booktabs; notes as comments."""
    lines = []
    for grid in grids(found, domains):
        align = "l" + "r" * (len(grid.header) - 1)
        lines += [f"% {grid.title}", f"\\begin{{tabular}}{{{align}}}", r"\toprule"]
        lines.append(" & ".join(map(_tex, grid.header)) + r" \\")
        lines.append(r"\midrule")
        best = _best(found, grid.header)
        for number, line in enumerate(grid.body):
            cells = [
                rf"\textbf{{{_tex(cell)}}}" if number in best.get(title, ()) else _tex(cell)
                for title, cell in zip(grid.header, line, strict=True)
            ]
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*lines, *(f"% {note}" for note in notes(found))]) + "\n"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _best(found: Comparison, header: Sequence[str]) -> Mapping[str, set[int]]:
    """Rows with the highest score of a column, the oracle aside."""
    best: dict[str, set[int]] = {}
    for title in header:
        means = {}
        for number, row in enumerate(found.rows):
            cell = row.domain(title) if title in found.domains else row.cell(AVERAGE) if title == "average" else None
            if cell is not None and row.method != "oracle":
                means[number] = cell.mean
        if means:
            best[title] = {number for number, value in means.items() if value == max(means.values())}
    return best
