"""The report of a recycling: one table over the seeds, convergence curves, and one HTML page.

What recycling claims is speed, so besides the final accuracy the table says after how many updates each start reaches
given accuracies, and how many times fewer that is than the reference start needs, paired within each seed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.errors import DataError, SpecError, nearest
from workers.context import Context
from workers.figures import MARKERS, PALETTE, new_figure, png, styled
from workers.jetpack_train import CURVE
from workers.report_page import Figure, fill_template

NETWORKS = {"sphero": "SpheroMoE", "soft_moe": "Soft MoE", "dense": "dense"}
_MOST_BANDS = 6
WARNING = "The images are a generated miniature: these numbers test the pipeline, not the method."


@dataclass(frozen=True)
class Run:
    """One fine-tuning: its ``meta``, and the curve as updates and shares."""

    meta: Mapping[str, Any]
    steps: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def final(self) -> float:
        """The last score of the curve."""
        return self.scores[-1]

    def reaches(self, target: float) -> int | None:
        """First recorded update with at least this score."""
        return next((s for s, score in zip(self.steps, self.scores, strict=True) if score >= target), None)


def write_report(config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Write ``table.{md,csv,json}``, ``convergence.png`` and ``report.html``; returns ``meta``.

    Args:
        config: fields of the ``jetpack_report`` stage.
        context: port ``runs``.

    Raises:
        DataError: no runs, or runs of several data sets.
        SpecError: the reference is none of the starts.
    """
    runs = _read(context)
    starts = _by_start(runs)
    reference = config["reference"]
    if reference is not None and reference not in starts:
        raise SpecError(f"The reference start {reference!r} is not among the runs.", nearest(reference, starts))
    targets = config["targets"] or _targets(runs)
    rows = [_row(name, own, starts.get(reference or "", ()), targets) for name, own in starts.items()]
    header, body = _strings(rows, targets, reference)
    metric = str(runs[0].meta["metric"])
    caption = (
        f"Mean ± standard deviation over seeds; {metric.replace('_', ' ')} in %. Updates: first recorded point of the "
        "validation curve at or above the target; n/m: reached by n of m seeds. Ratios are paired within seeds; ≥: the "
        "reference did not get there in all its updates."
    )
    note = [WARNING] if runs[0].meta["miniature"] else []
    most = max(row["final"]["seeds"] for row in rows)
    lacking = [f"{r['start']}: {r['final']['seeds']} of {most} seeds" for r in rows if r["final"]["seeds"] < most]
    (context.output / "table.md").write_text(
        _markdown(header, body) + "".join(f"\n{line}\n" for line in [*lacking, *note])
    )
    (context.output / "table.csv").write_text(_csv(header, body))
    record = {"metric": metric, "targets": list(targets), "reference": reference, "rows": rows}
    (context.output / "table.json").write_text(json.dumps(record, indent=1, sort_keys=True))
    curves = convergence({name: [(r.steps, r.scores) for r in own] for name, own in starts.items()}, targets, metric)
    (context.output / "convergence.png").write_bytes(curves)
    figure = Figure("Convergence", "Validation score after each update; bands span the seeds.", curves)
    table = {"title": f"Starts on {runs[0].meta['dataset']}", "caption": caption, "header": header, "body": body}
    page = {**config, "summary": " ".join([config["summary"], *note]).strip(), "figures": [figure]}
    html = fill_template("benchmark.html.j2", page=page, tables=[table], notes=lacking, settings=_settings(runs))
    (context.output / "report.html").write_text(html)
    context.log("\n" + _markdown(header, body))
    context.metrics({f"{row['start']}/final".replace(" ", "_"): row["final"]["mean"] for row in rows})
    return {"title": config["title"], "runs": len(runs), "starts": list(starts)}


@styled
def convergence(
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]], targets: Sequence[float], metric: str
) -> bytes:
    """Score against update, one line per start (mean over its runs), the best first in the legend.

    Bands from the lowest to the highest run, where there are few enough starts to tell them apart.
    """
    figure, axes = new_figure(8.6, 4.2)
    ends = {}
    for number, (name, runs) in enumerate(curves.items()):
        shared = sorted(set.intersection(*(set(steps) for steps, _ in runs)))
        values = 100 * np.array([[dict(zip(*run, strict=True))[step] for step in shared] for run in runs])
        colour = PALETTE[number % len(PALETTE)]
        mean, marker = values.mean(axis=0), MARKERS[number % len(MARKERS)]
        style = "-" if number < len(PALETTE) else "--"
        (line,) = axes.plot(shared, mean, style, color=colour, marker=marker, ms=4, lw=1.8, label=name)
        ends[name] = (mean[-1], line)
        if len(curves) <= _MOST_BANDS:
            axes.fill_between(shared, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.1, lw=0)
    for target in targets:
        axes.axhline(100 * target, color="#999999", lw=0.8, ls=":")
    axes.set_xlabel("update")
    axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
    lines = [line for _, line in sorted(ends.values(), key=lambda end: -end[0])]
    axes.legend(handles=lines, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return png(figure)


def _read(context: Context) -> list[Run]:
    runs = []
    for artifact in context.inputs["runs"]:
        record = json.loads((artifact.path / CURVE).read_text())
        points = record["curve"]
        scores = tuple(float(p[record["metric"]]) for p in points)
        runs.append(Run(artifact.meta, tuple(int(p["step"]) for p in points), scores))
    datasets = sorted({str(run.meta["dataset"]) for run in runs})
    if len(datasets) != 1:
        raise DataError(
            f"These are runs of {len(datasets)} data sets ({', '.join(datasets)}).", "Report one data set at a time."
        )
    return runs


def _by_start(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(str(run.meta["start"]), []).append(run)
    return found


def _targets(runs: Sequence[Run]) -> tuple[float, ...]:
    """Half, three quarters and nine tenths of the best final score, in whole per cent."""
    best = max(run.final for run in runs)
    return tuple(sorted({max(0.01, round(best * share, 2)) for share in (0.5, 0.75, 0.9)}))


def _row(name: str, own: Sequence[Run], reference: Sequence[Run], targets: Sequence[float]) -> dict[str, Any]:
    """Figures of one start."""
    others = {run.meta["seed"]: run for run in reference}
    reached, ratios = [], []
    for target in targets:
        at = [run.reaches(target) for run in own]
        there = [step for step in at if step is not None]
        reached.append({"mean": float(np.mean(there)) if there else None, "reached": len(there), "runs": len(at)})
        ratios.append(_speedup(own, others, target))
    tests = {split: _spread([r.meta["tests"][split][r.meta["metric"]] for r in own]) for split in own[0].meta["tests"]}
    return {
        "start": name,
        "network": own[0].meta["network"],
        "parameters": own[0].meta["parameters"],
        "final": _spread([run.final for run in own]),
        "tests": tests,
        "reached": reached,
        "speedup": ratios,
    }


def _speedup(own: Sequence[Run], others: Mapping[int, Run], target: float) -> dict[str, Any] | None:
    """How many times fewer updates than the reference of the same seed: geometric mean over the seeds.

    A reference that never gets there counts with all its updates, which makes the ratio a lower bound; None when a run
    itself does not get there, or when there is no reference of its seed.
    """
    logs, bound = [], False
    for run in own:
        step, other = run.reaches(target), others.get(run.meta["seed"])
        if step is None or other is None:
            return None
        theirs = other.reaches(target)
        bound = bound or theirs is None
        logs.append(np.log((other.steps[-1] if theirs is None else theirs) / step))
    return {"ratio": float(np.exp(np.mean(logs))), "bound": bound}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "seeds": len(values)}


def _strings(
    rows: Sequence[Mapping[str, Any]], targets: Sequence[float], reference: str | None
) -> tuple[list[str], list[list[str]]]:
    splits = list(rows[0]["tests"])
    header = ["start", "network", "parameters", "validation", *splits, *(f"updates to {100 * t:g} %" for t in targets)]
    header += [f"times fewer than {reference}, to {100 * t:g} %" for t in targets] if reference else []
    body = []
    for row in rows:
        line = [row["start"], NETWORKS[row["network"]], f"{row['parameters'] / 1e6:.1f} M", _percent(row["final"])]
        line += [_percent(row["tests"][split]) for split in splits]
        line += [_updates(cell) for cell in row["reached"]]
        line += [_ratio(cell) for cell in row["speedup"]] if reference else []
        body.append(line)
    return header, body


def _percent(cell: Mapping[str, Any]) -> str:
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    return f"{100 * cell['mean']:.1f}{spread}"


def _updates(cell: Mapping[str, Any]) -> str:
    if cell["mean"] is None:
        return "–"
    part = "" if cell["reached"] == cell["runs"] else f" ({cell['reached']}/{cell['runs']})"
    return f"{cell['mean']:.0f}{part}"


def _ratio(cell: Mapping[str, Any] | None) -> str:
    return "–" if cell is None else f"{'≥ ' if cell['bound'] else ''}{cell['ratio']:.2f}"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _csv(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *body])
    return text.getvalue()


def _geometry(spec: Mapping[str, Any]) -> str:
    if "dims" in spec:
        return f"widths {', '.join(map(str, spec['dims']))}, {', '.join(map(str, spec['depths']))} blocks"
    return f"width {spec['dim']}, {spec['depth']} blocks"


def _settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    first = runs[0].meta
    spec = first["spec"]
    return [
        ("image", f"{spec['image_size']} px" + (f", patches of {spec['patch_size']}" if "patch_size" in spec else "")),
        ("network", _geometry(spec)),
        ("training images", str(first["rows"])),
        ("updates", f"{first['steps']} of {first['batch']} images"),
        ("seeds", ", ".join(str(seed) for seed in sorted({int(run.meta["seed"]) for run in runs}))),
    ]
