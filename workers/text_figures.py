"""Figures of a text search as PNG bytes: bars against dense, routing over time, activations by cluster, modularity.

They are of the kind of EMoE's figures 3, 4 and 6 (arXiv 2310.10908), drawn from our own runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError
from workers.figures import MARKERS, PALETTE, new_figure, png, styled
from workers.text_table import Evaluation, averages, ood_sets, rows_of

ROUTES = {
    "best": "best possible",
    "avg_k": "avg-k",
    "fixed": "same experts for all",
    "random_split": "avg-k, random split",
    "random": "random routing",
    "bottom": "worst experts",
}


@styled
def gain_bars(evaluations: Sequence[Evaluation], tuning: str) -> bytes:
    """Difference to dense tuning of the same seed, by set: one bar per method and form, whiskers are standard errors.

    Raises:
        DataError: dense was not evaluated, or nothing else was.
    """
    own = [e for e in evaluations if e["tuning"] == tuning]
    dense = next((e for e in own if e["method"] == "dense"), None)
    lines = [row for row in rows_of(own) if not (row[3]["method"] == "dense" and row[2] == "trained")]
    if dense is None or not lines:
        raise DataError("There is nothing to compare with dense tuning.", "Evaluate dense and another method.")
    sets = ["validation", *ood_sets(dense)]
    figure, axes = new_figure(max(6.4, 1.6 + len(sets) * (0.5 + 0.34 * len(lines))), 3.8)
    place, width = np.arange(len(sets)), 0.8 / len(lines)
    for number, (_, label, form, evaluation) in enumerate(lines):
        gains = [paired(evaluation, form, dense, name) for name in sets]
        axes.bar(
            place + (number - (len(lines) - 1) / 2) * width,
            [100 * float(np.mean(g)) for g in gains],
            width * 0.9,
            yerr=[100 * float(np.std(g, ddof=1) / np.sqrt(len(g))) if len(g) > 1 else 0.0 for g in gains],
            color=PALETTE[number % len(PALETTE)],
            label=label.rpartition(" (")[0],
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        )
    axes.axhline(0, color="#333333", linestyle="--", linewidth=1.2)
    axes.set_xticks(place, ["in domain" if name == "validation" else f"OOD {name[4:]}" for name in sets])
    axes.set_ylabel("points above dense")
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower left", bbox_to_anchor=(-0.01, 1.0))
    return png(figure)


def paired(evaluation: Evaluation, form: str, dense: Evaluation, split: str) -> NDArray[np.float64]:
    """Difference to dense of every seed that both have."""
    mine = dict(zip(evaluation["selected"]["seeds"], averages(evaluation, form, split), strict=True))
    theirs = dict(zip(dense["selected"]["seeds"], averages(dense, "trained", split), strict=True))
    return np.asarray([mine[seed] - theirs[seed] for seed in mine if seed in theirs], dtype=np.float64)


@styled
def routing_map(records: Mapping[str, Mapping[str, NDArray[Any]]]) -> bytes:
    """Share of the choices that each expert (rows) gets at each evaluation (columns), one panel per method.

    Experts are sorted by their share at the end; the last converted layer is shown.

    Raises:
        DataError: no record.
    """
    if not records:
        raise DataError("No routing was recorded.", "Evaluate a method with experts.")
    figure, _ = new_figure(2.0 + 2.9 * len(records), 4.2, panels=len(records))
    for axes, (label, record) in zip(figure.axes, records.items(), strict=True):
        counts = record["counts"][:, -1, :].astype(np.float64)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * counts.shape[1]
        order = np.argsort(-share[-1], kind="stable")
        image = axes.imshow(share[:, order].T, aspect="auto", cmap="cividis", vmin=0, vmax=3, interpolation="nearest")
        axes.set_xticks(np.arange(len(record["steps"])), [str(int(s) + 1) for s in record["steps"]], fontsize=8)
        axes.set_title(label)
        axes.set_xlabel("update")
        axes.grid(visible=False)
    figure.axes[0].set_ylabel("expert, by share at the end")
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.05, pad=0.02, extend="max")
    bar.set_label("load, 1 is an equal share")
    return png(figure)


@styled
def activation_map(active: NDArray[Any], labels: NDArray[Any], layer: int) -> bytes:
    """The strongest 1.1 % of the activations (rows: tokens, columns: neurons) in raw order and sorted by expert."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    # Tokens sorted by the expert that fires most for them, so that blocks show where there are any.
    mass = np.stack([active[:, labels == e].astype(np.float64).sum(axis=1) for e in range(len(sizes))], axis=1)
    rows = np.argsort(mass.argmax(axis=1), kind="stable")
    figure, _ = new_figure(9.2, 3.8, panels=2)
    for axes, columns, title in zip(
        figure.axes, (np.arange(len(labels)), order), ("raw order", "by expert"), strict=True
    ):
        at, which = np.nonzero(active[rows][:, columns])
        strength = active[rows][:, columns][at, which].astype(np.float64)
        axes.scatter(which, at, s=1.5 + 2.5 * strength / strength.max(), c=PALETTE[0], alpha=0.5, linewidths=0)
        axes.set_xlim(0, len(labels))
        axes.set_xlabel(f"neuron of layer {layer}")
        axes.set_title(title)
        axes.grid(visible=False)
    figure.axes[0].set_ylabel("token")
    return png(figure)


@styled
def modularity_lines(reports: Sequence[Mapping[str, Any]]) -> bytes:
    """Share of the positive pre-activation mass inside the chosen experts, by layer, before any tuning.

    Raises:
        DataError: no layer was measured.
    """
    if not reports:
        raise DataError("No layer was measured.", "Set `measured` of text_split.")
    experts, top_k = reports[0]["num_experts"], reports[0]["top_k"]
    own = [r for r in reports if (r["num_experts"], r["top_k"]) == (experts, top_k)]
    layers = [r["layer"] for r in own]
    figure, axes = new_figure(6.8, 3.8)
    for number, (route, label) in enumerate(ROUTES.items()):
        values = [100 * r["routes"][route]["capture"] for r in own]
        axes.plot(layers, values, color=PALETTE[number], marker=MARKERS[number], markersize=5, label=label)
    axes.set_xticks(layers)
    axes.set_ylim(0, None)
    axes.set_xlabel("layer")
    axes.set_ylabel("captured mass, %")
    axes.set_title(f"{top_k} of {experts} experts, before tuning")
    axes.legend(frameon=False, fontsize=8.5, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)
