"""A comparison as one HTML file that needs nothing else: tables, notes, figures, and the command that made it."""

from __future__ import annotations

from orchestrator.compare import AVERAGE, WORST, Cell, Comparison, Row
from orchestrator.compare_render import grids, notes
from workers.compare_figures import Line, cost_points, differences, domain_points
from workers.report_page import Figure, fill_template


def page(found: Comparison, command: str, domains: bool = True) -> str:
    """The HTML text.

    Args:
        found: the comparison.
        command: what to type to get it again.
        domains: with a column for each domain.
    """
    return fill_template(
        "compare.html.j2",
        page={"title": "Comparison of " + (found.runs[0] if len(found.runs) == 1 else f"{len(found.runs)} runs")},
        lead=_lead(found),
        grids=grids(found, domains),
        notes=notes(found),
        figures=_figures(found),
        runs=found.runs,
        command=command,
    )


def _lead(found: Comparison) -> str:
    best = max((row for row in found.rows if row.method != "oracle"), key=_average, default=None)
    if best is None or len(found.settings) > 1:
        return ""
    cell, mark = best.cell(AVERAGE), best.difference
    if cell is None:
        return ""
    scale, unit = (100, "%") if best.percent else (1, "")
    where = "average over domains" if len(found.domains) > 1 else found.domains[0]
    sure = ""
    # Only a difference of the score that is told here says how sure it is.
    if mark is not None and mark.low is not None and found.options.metric == AVERAGE:
        sure = (
            ", and the difference to the baseline is significant"
            if mark.mark
            else ", and the difference to the baseline is within chance"
        )
    return f"Highest score ({where}): {best.label}, {scale * cell.mean:.1f} {unit}{sure}."


def _average(row: Row) -> float:
    cell = row.cell(AVERAGE)
    return cell.mean if cell else float("-inf")


def _figures(found: Comparison) -> list[Figure]:
    # The oracle saw labels; on the scale of its scores nobody could tell the others apart.
    rows = [row for row in found.rows if row.method != "oracle"] or found.rows
    lines = [_line(row, found) for row in rows]
    unit = "accuracy (%)" if found.rows[0].percent else found.settings[0].metric
    drawn = []
    if len(found.settings) == 1 and len(found.domains) > 1:
        drawn.append(
            Figure(
                "Scores by domain",
                "One marker for each row; whiskers are standard errors over seeds.",
                domain_points(lines, found.domains, unit),
            )
        )
    if any(line.difference for line in lines):
        drawn.append(
            Figure(
                "How sure the differences are",
                "A filled marker is significant after Holm's correction. The oracle is left out of all figures.",
                differences(lines, found.baseline, "points" if found.rows[0].percent else "score"),
            )
        )
    for by in ("hours", "flops"):
        if len(found.settings) == 1 and sum(getattr(line, by) is not None for line in lines) > 1:
            title = "What training costs" if by == "hours" else "What a prediction costs"
            drawn.append(Figure(title, "Further left is cheaper, further up is better.", cost_points(lines, unit, by)))
    return drawn


def _line(row: Row, found: Comparison) -> Line:
    scale = 100.0 if row.percent else 1.0

    def pair(cell: Cell | None) -> tuple[float, float] | None:
        return None if cell is None else (scale * cell.mean, scale * (cell.error or 0.0))

    worst, mark = row.cell(WORST), row.difference
    return Line(
        label=row.label,
        domains=[pair(row.domain(name)) for name in found.domains],
        average=pair(row.cell(AVERAGE)) or (0.0, 0.0),
        worst=scale * worst.mean if worst else 0.0,
        difference=None
        if mark is None
        else (
            scale * mark.mean,
            None if mark.low is None else scale * mark.low,
            None if mark.high is None else scale * mark.high,
        ),
        significant=bool(mark and mark.mark),
        hours=row.hours.hours if row.hours else None,
        flops=row.cost.flops,
    )
