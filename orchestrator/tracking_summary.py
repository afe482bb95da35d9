"""What the pipeline's own MLflow run says at its end, so that runs can be compared with each other there.

The selected scores under stable names (``test/avg/METHOD``, ``test/worst_domain/METHOD``, ``test/DOMAIN/METHOD``), the
costs, and a description with the table and a link to the report. They come from the run store, hits included, by the
code of ``moepipe compare``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.compare import AVERAGE, WORST, Comparison, Options, Row, compare, read_all
from orchestrator.compare_read import read_run
from orchestrator.compare_render import grids, notes
from orchestrator.compare_sources import Reader
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.tracking_state import MAX_METRIC_KEYS

_LONGEST_NOTE = 4500  # MLflow refuses tags of more than 5000 characters
_MOST_ROWS = 25


@dataclass(frozen=True)
class Summary:
    """See the module.

    Attributes:
        metrics: name -> value, at most 60.
        tags: ``moepipe.selection`` and ``moepipe.held_out`` where there is something to say.
        table: Markdown; empty without results.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    table: str = ""


def summarise(run: Run, store: Store) -> Summary:
    """The summary of a run; empty when it has no results that can be compared.

    Raises:
        MoepipeError: a result is damaged.
    """
    found, _ = read_all(Reader(store), [read_run(run)])
    if not found:
        return Summary()
    # One run may hold several data sets; they stand in one table only here.
    table = compare(found, Options(allow_different=True))
    metrics = dict(list(_metrics(table))[:MAX_METRIC_KEYS])
    tags = {"moepipe.selection": ",".join(table.selections), "moepipe.held_out": ",".join(table.domains)[:1000]}
    return Summary(metrics, tags, _markdown(table))


def _metrics(table: Comparison) -> Iterator[tuple[str, float]]:
    """The most telling first: what does not fit is left out at the end."""
    for name, metric in (("avg", AVERAGE), ("worst_domain", WORST)):
        for row in table.rows:
            cell = row.cell(metric)
            if cell is not None:
                yield f"test/{name}/{row.id}", cell.mean
    for row in table.rows:
        if row.difference is not None:
            yield f"test/gain/{row.id}", row.difference.mean
    yield from _costs(table.rows)
    if len(table.domains) > 1:
        for domain in table.domains:
            for row in table.rows:
                cell = row.domain(domain)
                if cell is not None:
                    yield f"test/{domain}/{row.id}", cell.mean


def _costs(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    for row in rows:
        if row.adaptation:
            continue  # the same model
        if row.hours is not None:
            yield f"cost/device_hours/{row.id}", row.hours.hours
        if row.cost.flops is not None:
            yield f"cost/flops/{row.id}", row.cost.flops


def _markdown(table: Comparison) -> str:
    grid = grids(table, domains=False)[0]
    lines = [f"**{grid.title}**", "", "| " + " | ".join(grid.header) + " |", "|" + "---|" * len(grid.header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in grid.body[:_MOST_ROWS]]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(table))])


def description(summary: Summary, run: str, mlflow_run: str, reports: Sequence[str], text: str) -> str:
    """The run's description in MLflow: what it is, links to its report pages, the table.

    Args:
        summary: of the run.
        run: id in the store.
        mlflow_run: id in MLflow.
        reports: paths of HTML files among the run's artifacts.
        text: the pipeline's description.
    """
    links = [f"[{path}](get-artifact?path={path}&run_uuid={mlflow_run})" for path in reports]
    parts = [text, "Report: " + ", ".join(links) if links else "", summary.table, f"`moepipe compare {run}`"]
    return "\n\n".join(part for part in parts if part)[:_LONGEST_NOTE]
