"""A saved view of MLflow's run page: which columns and charts it opens with, so that nobody has to click them together.

MLflow keeps what its "share" button makes as a tag of the experiment (``mlflow.sharedViewState.KEY``, the page's state
as JSON, deflated) and opens it by an address. The same is written here: pipeline runs only, selected scores as columns,
parallel coordinates from the settings that differ to the scores, bars of every score, and score against cost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

TAG = "mlflow.sharedViewState."
_FILTER = "tags.`moepipe.type` = 'pipeline'"
_SCORES, _WORST, _COST = "test/avg/", "test/worst_domain/", "cost/device_hours/"
_MOST_AXES = 4
# Settings that say what a run is called and not how it works.
_NOT_SETTINGS = ("name", "description", "stages.report")

Numbers = Mapping[str, float]
Texts = Mapping[str, str]


def view_state(runs: Sequence[tuple[Numbers, Texts]]) -> dict[str, Any]:
    """The page's state for some runs.

    Args:
        runs: metrics and parameters of each, newest first.
    """
    scores, worst = (_telling(runs, start) for start in (_SCORES, _WORST))
    params = _varying(runs)
    columns = [f"params.`{key}`" for key in params[:_MOST_AXES]] + [f"metrics.`{key}`" for key in scores[:_MOST_AXES]]
    tags = ("moepipe.dataset", "moepipe.scale", "moepipe.held_out")
    return {
        "searchFilter": _FILTER,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*columns, *(f"tags.`{tag}`" for tag in tags)],
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": _charts(scores, worst, params, _costs(runs, scores)),
        "compareRunSections": [_section("overview", "Settings and scores", 1), _section("scores", "Scores", 3)],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }


def encode(state: Mapping[str, Any]) -> tuple[str, str]:
    """Key of a state, and the text that MLflow keeps."""
    text = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    packed = "deflate;" + base64.b64encode(zlib.compress(text, 9)).decode("ascii")
    return hashlib.sha256(text).hexdigest()[:32], packed


def view_link(base: str, experiment: str, key: str, charts: bool) -> str:
    """Address of the page with this view: its charts, or its table."""
    mode = "CHART" if charts else "TABLE"
    return f"{base}/#/experiments/{experiment}/runs?viewStateShareKey={key}&compareRunsMode={mode}"


def _keys(runs: Sequence[tuple[Numbers, Texts]]) -> list[str]:
    return sorted({key for metrics, _ in runs for key in metrics})


def _telling(runs: Sequence[tuple[Numbers, Texts]], start: str) -> list[str]:
    """Metrics whose name begins so, those first that differ most between the runs."""

    def spread(key: str) -> float:
        values = [metrics[key] for metrics, _ in runs if key in metrics]
        return max(values) - min(values)

    return sorted((key for key in _keys(runs) if key.startswith(start)), key=lambda key: (-spread(key), key))


def _varying(runs: Sequence[tuple[Numbers, Texts]]) -> list[str]:
    """Parameters with several values, those of the fewest letters first."""
    names = sorted({key for _, params in runs for key in params}, key=lambda key: (len(key), key))
    found = [key for key in names if not key.startswith(_NOT_SETTINGS)]
    return [key for key in found if len({params.get(key) for _, params in runs}) > 1]


def _costs(runs: Sequence[tuple[Numbers, Texts]], scores: Sequence[str]) -> list[tuple[str, str]]:
    """(cost, score) of the methods whose cost is known."""
    known = set(_keys(runs))
    pairs = [(_COST + key.removeprefix(_SCORES), key) for key in scores]
    return [(cost, score) for cost, score in pairs if cost in known]


def _charts(
    scores: Sequence[str], worst: Sequence[str], params: Sequence[str], costs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    shown = [score for score in scores if "oracle" not in score][:2]
    charts = []
    if shown:
        axes = {"selectedParams": list(params[:_MOST_AXES]), "selectedMetrics": shown, "showAllRuns": False}
        charts.append(_chart("PARALLEL", "overview", "parallel", **axes))
    for cost, score in costs[:1]:
        kind = {"type": "METRIC"}
        charts.append(_chart("SCATTER", "scores", "cost", xaxis={"key": cost, **kind}, yaxis={"key": score, **kind}))
    for key in (*scores, *worst):
        charts.append(_chart("BAR", "scores", key, metricKey=key, displayName=key))
    return charts


def _chart(kind: str, section: str, name: str, **more: Any) -> dict[str, Any]:
    uuid = hashlib.sha256(f"{kind} {name}".encode()).hexdigest()[:16]
    fixed = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False}
    return {"type": kind, "uuid": uuid, "metricSectionId": f"moepipe-{section}", **fixed, **more}


def _section(name: str, title: str, columns: int) -> dict[str, Any]:
    flags = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": f"moepipe-{name}", "name": title, "columns": columns, **flags}
