"""The report: one HTML file that needs nothing else, neither network nor scripts.

Styles and figures are inside; the page follows the reader's light or dark theme. Everything that came from a run is
escaped by the template engine.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.errors import DataError
from workers.evaluation_result import Bounds, EvaluationResult, order_of
from workers.results_table import Table


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        title: heading.
        caption: what to see in it, one or two sentences.
        png: the file's bytes.
    """

    title: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class ReportPage:
    """What the page says besides the results.

    Attributes:
        title: heading and browser title.
        summary: one paragraph.
        table: the combined table.
        results: one evaluation per seed.
        figures: in order.
        settings: name -> value, shown as a list (model, budgets in steps, selection rule, ...).
        command: what to type to get these numbers again.
        spec: the pipeline as JSON, folded away; empty leaves it out.
    """

    title: str
    summary: str
    table: Table
    results: Sequence[EvaluationResult]
    figures: Sequence[Figure] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)


def render(page: ReportPage) -> str:
    """The HTML text; equal pages give equal bytes.

    Raises:
        DataError: there is no result to report.
    """
    if not page.results:
        raise DataError("There are no results to report.", "Evaluate at least one seed.")
    header, body = page.table.strings()
    return fill_template(
        "report.html.j2",
        page=page,
        header=header,
        body=[(row.name, line) for row, line in zip(page.table.rows, body, strict=True)],
        seeds=[_seed(result) for result in page.results],
        several=len({result.methods[0].name for result in page.results}) > 1,
        domains=_domains(page.results),
        streams=_streams(page.results),
        settings=[(name.replace("_", " "), _text(value)) for name, value in page.settings.items()],
        spec=json.dumps(page.spec, indent=2, sort_keys=True) if page.spec else "",
    )


def fill_template(name: str, **values: Any) -> str:
    """A template of this package with ``values`` in it, which are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("workers"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**values)


def _seed(result: EvaluationResult) -> dict[str, Any]:
    """Rows of one seed: score with its interval, and gain with its interval."""
    percent = result.task != "regression"
    rows = []
    for method in result.methods:
        score = method.intervals.get(result.metric)
        gain = method.gains.get(result.metric)
        worst = method.intervals.get("domain_worst")
        plain = _number(method.scores[result.metric], percent)
        rows.append(
            {
                "label": method.label,
                "score": plain if score is None else _bounds(score, percent),
                "worst": _number(method.domain_worst, percent) if worst is None else _bounds(worst, percent),
                "gain": "–" if gain is None else _bounds(gain, percent, signed=True),
            }
        )
    metric = result.metric.replace("_", " ")
    return {"seed": result.seed, "network": result.methods[0].label, "metric": metric, "rows": rows}


def _domains(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Domain × method scores, mean over the seeds; empty when the seeds do not share their domains."""
    first = results[0]
    if any(result.domains != first.domains for result in results):
        return {}
    percent = first.task != "regression"
    methods = order_of(results)
    rows = []
    for index, name in enumerate(first.domains):
        cells = []
        for method, _ in methods:
            found = [m.domain_scores[index] for r in results for m in r.methods if m.name == method]
            cells.append(_number(sum(found) / len(found), percent))
        rows.append({"name": name, "count": first.counts[index], "cells": cells})
    return {"labels": [label for _, label in methods], "rows": rows}


def _streams(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Setting × method scores of the online settings, mean over the seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    labels: dict[str, str] = {}
    for result in results:
        for entry in result.streams:
            found.setdefault((entry.setting, entry.method), []).append(entry.score)
            labels.setdefault(entry.method, entry.label)
    settings = list(dict.fromkeys(setting for setting, _ in found))
    percent = results[0].task != "regression"
    rows = []
    for setting in settings:
        values = [found.get((setting, method), []) for method in labels]
        rows.append(
            {
                "name": setting.replace("_", " "),
                "cells": [_number(sum(v) / len(v), percent) if v else "–" for v in values],
            }
        )
    return {"labels": list(labels.values()), "rows": rows} if rows else {}


def _number(value: float, percent: bool, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.3f}"


def _bounds(bounds: Bounds, percent: bool, signed: bool = False) -> str:
    value, low, high = (_number(v, percent, signed) for v in (bounds.value, bounds.low, bounds.high))
    return f"{value} [{low}, {high}]"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return json.dumps(value)
