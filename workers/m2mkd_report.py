"""The report of an m2mKD pipeline: one table over seeds, how good each module is, learning curves, one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe.errors import DataError
from workers.context import Context, Input
from workers.figures import training_curves
from workers.m2mkd_evaluate import EVALUATION
from workers.report_page import Figure, fill_template
from workers.results_table import Cell, Column, Row, Table
from workers.text_table import csv_text, latex

WARNING = "The images are a generated miniature: these numbers test the pipeline, not the method."
Evaluation = Mapping[str, Any]


def write_report(config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Write ``table.{txt,md,tex,csv,json}``, ``curves.png`` and ``report.html``; ports ``metrics``, maybe ``modules``.

    Args:
        config: fields of the ``m2mkd_report`` stage.
        context: of the member.

    Raises:
        DataError: no evaluations, of different data, or the baseline is not among the models.
    """
    evaluations = [json.loads((a.path / EVALUATION).read_text()) for a in context.inputs["metrics"]]
    baseline = str(config["baseline"])
    table = build_table(evaluations, baseline)
    miniature = any(e["miniature"] for e in evaluations)
    ending = f"\n{WARNING}\n" if miniature else ""
    body = {
        "txt": table.text() + ending,
        "md": table.markdown() + ending,
        "tex": latex(table),
        "csv": csv_text(table),
        "json": json.dumps(table.to_json(), indent=1, sort_keys=True),
    }
    for suffix, text in body.items():
        (context.output / f"table.{suffix}").write_text(text)
    figures = _figures(evaluations)
    for name, figure in figures.items():
        (context.output / f"{name}.png").write_bytes(figure.png)
    page = {**config, "summary": f"{config['summary']} {WARNING if miniature else ''}".strip()}
    tables = [_shown(table), *_modules(context.inputs.get("modules", ()), evaluations[0]["metric"])]
    html = fill_template(
        "benchmark.html.j2",
        page={**page, "figures": list(figures.values())},
        tables=tables,
        notes=[],
        settings=list(_settings(evaluations).items()),
    )
    (context.output / "report.html").write_text(html)
    context.log("\n" + body["txt"])
    scores = {
        f"{row.name.replace(' ', '_')}/{column.key}": cell.mean
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell is not None
    }
    context.metrics(scores)
    return {"title": config["title"], "scores": {name: round(value, 6) for name, value in scores.items()}}


def build_table(evaluations: Sequence[Evaluation], baseline: str) -> Table:
    """One line per model; gains are paired with the baseline within each seed.

    Raises:
        DataError: nothing to report, evaluations of different data, or an unknown baseline.
    """
    if not evaluations:
        raise DataError("There are no evaluations to report.", "Wire a m2mkd_evaluate stage to `metrics`.")
    first = evaluations[0]
    if len({(e["dataset"], tuple(e["splits"]), json.dumps(e["few_shot"])) for e in evaluations}) > 1:
        raise DataError("These evaluations are of different data.", "Report one data set at a time.")
    labels = [str(model["label"]) for model in first["models"]]
    if baseline and baseline not in labels:
        raise DataError(f"The baseline {baseline!r} is none of the models.", f"Models: {', '.join(labels)}.")
    columns = [Column("images", "thousand images of a block", False)]
    for split in first["splits"]:
        columns.append(Column(split, split.replace("_", " "), True))
        if baseline:
            columns.append(Column(f"{split}:gain", f"gain ({split.replace('_', ' ')})", True, signed=True))
    if first["few_shot"] is not None:
        shots = first["few_shot"]
        columns.append(Column("few_shot", f"{shots['k_way']}-way {shots['n_shot']}-shot", True))
    rows = [Row(label, label, [_cell(evaluations, label, column, baseline) for column in columns]) for label in labels]
    seeds = sorted({int(e["seed"]) for e in evaluations})
    title = f"{first['title']}: {first['metric'].replace('_', ' ')}, {len(seeds)} seed{'s' * (len(seeds) != 1)}"
    return Table(title, columns, rows, _notes(first, seeds, baseline))


def _value(model: Mapping[str, Any], key: str, metric: str) -> float:
    if key == "images":
        return float(model["images"]) / 1000
    return float(model["few_shot"]["mean"] if key == "few_shot" else model["scores"][key][metric])


def _cell(evaluations: Sequence[Evaluation], label: str, column: Column, baseline: str) -> Cell | None:
    split, _, gain = column.key.partition(":")
    if gain and label == baseline:
        return None
    values = []
    for evaluation in evaluations:
        models = {model["label"]: model for model in evaluation["models"]}
        if label in models and (not gain or baseline in models):
            value = _value(models[label], split, evaluation["metric"])
            values.append(value - _value(models[baseline], split, evaluation["metric"]) if gain else value)
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 and split != "images" else None
    return Cell(float(np.mean(values)), spread, len(values))


def _notes(first: Evaluation, seeds: Sequence[int], baseline: str) -> list[str]:
    rows = ", ".join(f"{split} {count}" for split, count in first["rows"].items())
    notes = [f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds. Images: {rows}."]
    notes.append("Images of a block: while its module was distilled and end to end; equal numbers, equal budgets.")
    if baseline:
        notes.append(f"Gain: difference to {baseline!r}, paired within each seed.")
    if first["few_shot"] is not None:
        notes.append(f"Few-shot: mean over {first['few_shot']['episodes']} episodes, a fresh head on frozen features.")
    return notes


def _figures(evaluations: Sequence[Evaluation]) -> dict[str, Figure]:
    """Validation score of every model while it was trained end to end, mean over seeds."""
    metric = str(evaluations[0]["metric"])
    histories: dict[str, list[dict[str, float]]] = {}
    for model in evaluations[0]["models"]:
        label = model["label"]
        own = [m["history"] for e in evaluations for m in e["models"] if m["label"] == label]
        # Where the best state is kept, histories end with it: the mean goes as far as every seed does.
        steps = [record["step"] for record in min(own, key=len)]
        if len(steps) > 1 and all([r["step"] for r in history[: len(steps)]] == steps for history in own):
            histories[label] = [
                {"step": step, metric: float(np.mean([history[place][metric] for history in own]))}
                for place, step in enumerate(steps)
            ]
    if not histories:
        return {}
    caption = "Validation score, mean over seeds. Updates of the distilled modules do not count."
    return {"curves": Figure("End to end", caption, training_curves(histories, metric, "Validation score"))}


def _shown(table: Table) -> dict[str, Any]:
    header, body = table.strings()
    return {"title": table.title, "caption": " ".join(table.notes), "header": header, "body": body}


def _modules(artifacts: Sequence[Input], metric: str) -> list[dict[str, Any]]:
    """How good each student is in its place of the meta model."""
    if not artifacts:
        return []
    body = []
    for position in sorted({int(artifact.meta["position"]) for artifact in artifacts}):
        own = [artifact.meta for artifact in artifacts if artifact.meta["position"] == position]
        line = [str(position)]
        for name in (metric, "teacher", "agreement"):
            values = [100 * meta["scores"][name] for meta in own]
            line.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""))
        body.append([*line, str(own[0]["steps"])])
    return [
        {
            "title": "Modules",
            "caption": "Each student in its place of the frozen meta model, on validation images: score, that of its "
            "teacher module in the same place, and how often both prefer the same class.",
            "header": ["position", metric.replace("_", " "), "teacher module", "agreement", "updates"],
            "body": body,
        }
    ]


def _settings(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    first = evaluations[0]
    return {
        "data": str(first["dataset"]),
        "parameters": ", ".join(f"{m['label']} {m['parameters']:,}" for m in first["models"]),
        "images per update": ", ".join(f"{m['label']} {m['batch_size']}" for m in first["models"] if m["batch_size"]),
    }
