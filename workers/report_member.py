"""The member of the ``report`` stage: combine the seeds, draw, write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe.errors import SpecError, nearest
from workers.context import Context
from workers.distill_job import RESULT_FILE
from workers.evaluation_result import EvaluationResult, order_of
from workers.figures import adaptation_curve, attention_map, domain_bars, method_bars, training_curves
from workers.report_page import Figure, ReportPage, render
from workers.results_table import combine

BARS = ("student", "student_distill")
"""Methods of the per-domain bars unless the stage names others; left out where they were not evaluated."""


def write_report(config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Write the table (text, Markdown, JSON), the PNGs and ``report.html`` into ``context.output``.

    Args:
        config: fields of the ``report`` stage's config.
        context: its port ``metrics`` holds one evaluation per seed.

    Raises:
        DataError: the evaluations are of different data sets or protocols.
        SpecError: bars are asked for of methods that were not evaluated.
    """
    results = [EvaluationResult.load(artifact.path) for artifact in context.inputs["metrics"]]
    table = combine(results)
    figures = _figures(config, results, _histories(context))
    miniature = any(artifact.meta.get("miniature") for artifact in context.inputs["metrics"])
    summary = str(config["summary"])
    if miniature:
        warning = "The data is a generated miniature: these numbers test the pipeline, not the method."
        summary = f"{summary} {warning}".strip()
    page = ReportPage(
        title=str(config["title"]),
        summary=summary,
        table=table,
        results=results,
        figures=list(figures.values()),
        settings=_settings(results),
        command=str(config["command"]),
    )
    output = context.output
    for name, figure in figures.items():
        (output / f"{name}.png").write_bytes(figure.png)
    text = table.text() + ("\nGenerated miniature data: no statement about the method.\n" if miniature else "")
    (output / "table.txt").write_text(text)
    (output / "table.md").write_text(table.markdown())
    (output / "table.json").write_text(json.dumps(table.to_json(), indent=1, sort_keys=True))
    (output / "report.html").write_text(render(page))
    context.log("\n" + text)
    return {"title": config["title"], "figures": sorted(figures), "seeds": len(results)}


def _settings(results: list[EvaluationResult]) -> dict[str, Any]:
    """What the evaluations record; one value where all that have it agree, else one for each network and seed."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        for name, value in result.settings.items():
            found.setdefault(name, {})[f"{result.methods[0].label}, seed {result.seed}:"] = value
    return {name: own if len({json.dumps(v) for v in own.values()}) > 1 else next(iter(own.values()))
            for name, own in found.items()}  # fmt: skip


def _histories(context: Context) -> dict[str, list[dict[str, float]]]:
    """Validation scores of the distillation by seed."""
    found = {}
    for artifact in context.inputs.get("student", ()):
        record = json.loads((artifact.path / RESULT_FILE).read_text())
        rows = [{k: float(v) for k, v in row.items() if k != "selected"} for row in record["evaluations"]]
        if rows:
            found[artifact.member] = rows
    return found


def _figures(
    config: Mapping[str, Any], results: list[EvaluationResult], histories: Mapping[str, list[dict[str, float]]]
) -> dict[str, Figure]:
    """The figures that these results allow, by file name."""
    first, found = results[0], {}
    if len({result.methods[0].name for result in results}) > 1:
        found["methods"] = Figure(
            "All methods",
            "Dark: a model as it is. Light: the same model after an adaptation to the unseen domain.",
            method_bars(results),
        )
    before, after = config["before"], config["after"]
    both = [result for result in results if {before, after} <= {method.name for method in result.methods}]
    if not both and (before, after) != BARS:
        names = [name for name, _ in order_of(results)]
        unknown = next((name for name in (before, after) if name not in names), None)
        if unknown is not None:
            raise SpecError(f"There is no method {unknown!r} to draw in the bars.", nearest(unknown, names))
        raise SpecError(f"No evaluation holds both {before!r} and {after!r}.", "Name methods of one evaluation.")
    if both:
        found["domains"] = Figure(
            "Unseen domains, before and after adaptation",
            "One pair of bars for each unseen domain; whiskers show the spread over seeds.",
            domain_bars(both, before, after),
        )
    if first.attention is not None:
        found["attention"] = Figure(
            "Which experts the aggregator listens to",
            "Mean share of the attention that each expert's token receives, by unseen domain; one panel per seed.",
            attention_map(results),
        )
    if first.curves:
        found["curve"] = Figure(
            "Adaptation against the number of unlabelled images",
            "Score after adapting on so many images of the domain; 0 is the model as it is.",
            adaptation_curve(results),
        )
    if histories:
        found["training"] = Figure(
            "Meta-distillation",
            "Validation score of the adapted student while it is meta-trained.",
            training_curves(histories, first.metric, "Validation score during meta-distillation"),
        )
    return found
