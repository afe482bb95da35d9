"""The report of a text search: one table in every form, the figures, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workers.context import Context, Input
from workers.report_page import Figure, fill_template
from workers.results_table import Table
from workers.text_evaluate import EVALUATION
from workers.text_figures import activation_map, gain_bars, modularity_lines, routing_map
from workers.text_split import ACTIVATIONS, REPORT
from workers.text_table import Evaluation, build_table, csv_text, incomplete, latex
from workers.text_train import ROUTING

WARNING = "The texts are a generated miniature: these numbers test the pipeline, not the method."


def write_report(config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Write ``table.{txt,md,tex,csv,json}``, the PNGs and ``report.html`` into ``context.output``.

    Args:
        config: fields of the ``text_report`` stage.
        context: ports ``evaluations`` and maybe ``split``.

    Raises:
        DataError: no evaluations, or of different texts.
    """
    inputs = context.inputs["evaluations"]
    evaluations: list[Evaluation] = [json.loads((a.path / EVALUATION).read_text()) for a in inputs]
    table, notes = build_table(evaluations), incomplete(evaluations)
    split = context.inputs.get("split", ())
    figures = _figures(evaluations, inputs, split[0] if split else None)
    for name, figure in figures.items():
        (context.output / f"{name}.png").write_bytes(figure.png)
    miniature = any(e["miniature"] for e in evaluations)
    summary = f"{config['summary']} {WARNING if miniature else ''}".strip()
    ending = ("\n" + WARNING + "\n") if miniature else ""
    body = {
        "txt": table.text() + "".join(f"{note}\n" for note in notes) + ending,
        "md": table.markdown() + ending,
        "tex": latex(table),
        "csv": csv_text(table),
        "json": json.dumps(table.to_json(), indent=1, sort_keys=True),
    }
    for suffix, text in body.items():
        (context.output / f"table.{suffix}").write_text(text)
    page = {**config, "summary": summary, "figures": list(figures.values())}
    tables = [_shown(table), _candidates(evaluations), *_modularity(split[0] if split else None)]
    settings = {**_settings(evaluations), **_merged(context.inputs.get("merged", ()))}
    html = fill_template("benchmark.html.j2", page=page, tables=tables, notes=notes, settings=list(settings.items()))
    (context.output / "report.html").write_text(html)
    context.log("\n" + body["txt"])
    for row in table.rows:
        context.metrics({f"{row.name.replace(' ', '_')}/{c.key.replace(':', '_')}": cell.mean
                         for c, cell in zip(table.columns, row.cells, strict=True) if cell is not None})  # fmt: skip
    return {"title": config["title"], "lines": len(table.rows), "figures": sorted(figures), "incomplete": notes}


def _figures(evaluations: Sequence[Evaluation], inputs: Sequence[Input], split: Input | None) -> dict[str, Figure]:
    """The figures that these results allow, by file name."""
    found: dict[str, Figure] = {}
    for tuning, words in (("full", "full fine-tuning"), ("lora", "low-rank tuning")):
        own = [e for e in evaluations if e["tuning"] == tuning]
        if len(own) > 1 and any(e["method"] == "dense" for e in own):
            found[f"gains_{tuning}"] = Figure(
                f"Against dense, {words}",
                "Difference to the densely tuned network of the same seed, by set; whiskers are standard errors over "
                "seeds. Split at test: the dense network, converted after it was tuned.",
                gain_bars(evaluations, tuning),
            )
    routed = {
        f"{e['label']} ({e['tuning']})": dict(np.load(a.path / ROUTING))
        for e, a in zip(evaluations, inputs, strict=True)
        if (a.path / ROUTING).is_file() and e["method"] in ("emoe", "emoe_learn", "gmoe")
    }
    if routed:
        found["routing"] = Figure(
            "Which experts are used while tuning",
            "Load of every expert on the selection rows at each evaluation, first seed; 1 is its equal share.",
            routing_map(dict(list(routed.items())[:4])),
        )
    if split is not None:
        found |= _before_tuning(split)
    return found


def _before_tuning(split: Input) -> dict[str, Figure]:
    """Figures of the network as it was pretrained."""
    found: dict[str, Figure] = {}
    reports = json.loads((split.path / REPORT).read_text())["reports"]
    if reports:
        found["modularity"] = Figure(
            "How modular the layers are before tuning",
            "Share of the positive pre-activations that the chosen experts hold. Random routing is the floor that any "
            "choice must beat; a random split shows what clustering adds.",
            modularity_lines(reports),
        )
    if (split.path / ACTIVATIONS).is_file():
        with np.load(split.path / ACTIVATIONS, allow_pickle=False) as archive:
            active, labels, layer = archive["active"], archive["labels"], int(archive["layer"])
        found["activations"] = Figure(
            "Who fires together",
            "The strongest 1.1 % of the activations on training texts, neurons in their own order and sorted by "
            "expert; tokens sorted by the expert that fires most.",
            activation_map(active, labels, layer),
        )
    return found


def _shown(table: Table) -> dict[str, Any]:
    header, body = table.strings()
    return {
        "title": table.title,
        "caption": " ".join(note for note in table.notes if note),
        "header": header,
        "body": body,
    }


def _candidates(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What the search compared."""
    body = []
    for e in evaluations:
        for c in e["candidates"]:
            size = f"{c['top_k']} of {c['num_experts']}" if c["num_experts"] else "–"
            mark = "chosen" if c["selected"] else ""
            score = f"{100 * c['mean']:.1f} ± {100 * c['std']:.1f}"
            body.append([f"{e['label']} ({e['tuning']})", size, f"{c['lr']:g}", score, str(c["seeds"]), mark])
    return {
        "title": "The search",
        "caption": "Mean selection score over seeds; the best rate of a method is tested.",
        "header": ["method", "experts", "rate", "selection score", "seeds", ""],
        "body": body,
    }


def _modularity(split: Input | None) -> list[dict[str, Any]]:
    reports = [] if split is None else json.loads((split.path / REPORT).read_text())["reports"]
    if not reports:
        return []
    body = []
    for r in reports:
        avg, random = r["routes"]["avg_k"], r["routes"]["random"]
        line = [f"layer {r['layer']}, {r['top_k']} of {r['num_experts']}", f"{100 * r['firing']:.0f} %"]
        line += [f"{100 * r['top_tenth']:.0f} %"]
        line += [
            f"{100 * r['routes'][route]['capture']:.0f} %" for route in ("best", "avg_k", "random_split", "random")
        ]
        body.append([*line, f"{100 * avg['overlap']:.0f} %", f"{avg['error']:.2f}", f"{random['error']:.2f}"])
    captured = ["captured: best", "avg-k", "random split", "random routing"]
    return [
        {
            "title": "Modularity before tuning",
            "caption": "Firing: positive pre-activations. Top tenth: mass of a token's strongest tenth of neurons. "
            "Captured: mass inside the chosen experts. Error: relative change of the layer's output.",
            "header": ["", "firing", "top tenth", *captured, "overlap", "error avg-k", "error random"],
            "body": body,
        }
    ]


def _merged(artifacts: Sequence[Input]) -> dict[str, str]:
    """One line for each merged network."""
    found = {}
    for artifact in artifacts:
        meta = artifact.meta
        exact = "exact" if meta["exact"] else f"largest deviation of an expert's bias {meta['residual']:.2g}"
        found[f"merged: {meta['method']} {meta['tuning']}"] = (
            f"seed {meta['seed']}, {exact}, {meta['parameters']:,} parameters"
        )
    return found


def _settings(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    first = evaluations[0]
    sparse = next((e for e in evaluations if e["emoe"] is not None), None)
    found = {
        "selection": first["selection"],
        "rows": ", ".join(f"{name} {count}" for name, count in first["rows"].items()),
        "which parts train": first["rules"],
        "trained parameters": ", ".join(f"{e['label']} {e['tuning']} {e['trainable']:,}" for e in evaluations),
    }
    if sparse is not None:
        found["converted layers"] = ", ".join(map(str, sparse["layers"]))
    return found
