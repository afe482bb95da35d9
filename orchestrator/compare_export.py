"""A comparison as plain numbers for programs: CSV, and the document of ``--json`` (see ``docs/compare.md``)."""

from __future__ import annotations

import csv
import io
from typing import Any

from orchestrator.compare import AVERAGE, WORST, Cell, Comparison, Row
from orchestrator.compare_render import notes


def to_csv(found: Comparison) -> str:
    """One line per row, plain numbers (shares, not per cent)."""
    document = to_json(found)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = [AVERAGE, WORST, *_extra(found), *found.domains]
    fixed = ("id", "label", "method", "adaptation", "selection", "dataset", "protocol", "worst_domain")
    differs = ("mean", "low", "high", "p", "corrected", "level")
    costs = ("parameters", "active_parameters", "flops", "latency_ms", "device", "device_hours", "energy_wh")
    header = [*fixed, "seeds", *(f"{name} {part}" for name in scores for part in ("mean", "error"))]
    writer.writerow([*header, *(f"difference {name}" for name in differs), *costs, "updates", "runs"])
    for row in document["rows"]:
        cells = [row[name] for name in fixed] + [len(row["seeds"])]
        for name in scores:
            cell = row["scores"].get(name) or row["domains"].get(name) or {}
            cells += [cell.get("mean"), cell.get("error")]
        cells += [(row["difference"] or {}).get(name) for name in differs]
        cells += [row["cost"][name] for name in costs]
        cells += [" ".join(map(str, row["updates"])), " ".join(row["runs"])]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def to_json(found: Comparison) -> dict[str, Any]:
    """The document of ``--json``; its fields are described in ``docs/compare.md``."""
    return {
        "metric": found.options.metric,
        "baseline": found.baseline,
        "runs": found.runs,
        "domains": found.domains,
        "settings": [dict(vars(setting)) for setting in found.settings],
        "rows": [_row(found, row) for row in found.rows],
        "notes": notes(found),
    }


def _extra(found: Comparison) -> tuple[str, ...]:
    """The score that was asked for, where it is neither of those that always stand there."""
    return () if found.options.metric in (AVERAGE, WORST) else (found.options.metric,)


def _row(found: Comparison, row: Row) -> dict[str, Any]:
    spent, watts = row.hours, found.options.watts
    return {
        "id": row.id,
        "label": row.label,
        "method": row.method,
        "adaptation": row.adaptation,
        "selection": row.selection,
        "setting": row.group,
        "dataset": row.setting.dataset,
        "protocol": row.setting.protocol,
        "runs": row.runs,
        "seeds": row.seeds,
        "scores": {name: _plain(row.cell(name)) for name in (AVERAGE, WORST, *_extra(found))},
        "worst_domain": row.worst_name,
        "domains": {name: _plain(row.domain(name)) for name in row.domains},
        "baseline": row.baseline,
        "difference": None if row.difference is None else {**vars(row.difference), "mark": row.difference.mark},
        "cost": {
            **vars(row.cost),
            "device": spent.device if spent else None,
            "device_hours": spent.hours if spent else None,
            "energy_wh": spent.hours * watts if spent and watts is not None else None,
        },
        "updates": row.steps,
    }


def _plain(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else dict(vars(cell))
