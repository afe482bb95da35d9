"""Figures of a search: history, parallel coordinates, importance of each dimension, Pareto front; as PNG bytes.

Importance is fANOVA's (Hutter et al. 2014), by Optuna. The same study gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from workers.figures import AFTER, BEFORE, PALETTE, new_figure, png, styled
from workers.search_report import Study, best_row, cell, front, named
from workers.search_space import Dimension, identity

_WIDEST = 14


def figures(study: Study, shares: Mapping[str, float] | None) -> dict[str, bytes]:
    """Name -> PNG of everything that can be drawn."""
    from workers.search_lineage import figures as of_segments

    drawn: dict[str, bytes] = of_segments(study) if study.segmented else {}
    if study.done:
        drawn.setdefault("history", history(study))
        if study.space.dimensions:
            drawn["parallel"] = parallel_coordinates(study)
    if shares:
        drawn["importance"] = importance_bars(shares, len(study.done), study.segmented)
    if len(study.metrics) > 1 and study.done:
        drawn["front"] = pareto(study)
    return drawn


@styled
def history(study: Study) -> bytes:
    """Objective of every trial, and the best so far as a step line; failed and stopped trials at the lower edge."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(7.2, 3.8)
    done = study.done
    better = max if study.modes[0] == "max" else min
    so_far: list[float] = []
    for row in done:
        value = (row.objective or [math.nan])[0]
        so_far.append(better(so_far[-1], value) if so_far else value)
    sources = {
        "search": ("o", "trial of this search"),
        "earlier": ("D", "made before this search"),
    }
    for source, (marker, label) in sources.items():
        own = [row for row in done if row.source == source]
        if own:
            y = [(row.objective or [math.nan])[0] for row in own]
            axes.plot([r.number for r in own], y, marker, color=AFTER, label=label, markersize=5.5, alpha=0.85)
    axes.step([r.number for r in done], so_far, where="post", color=BEFORE, linewidth=2, label="best so far")
    for state, marker in (("failed", "x"), ("stopped", "|")):
        ended = [row.number for row in study.rows if row.state == state]
        if ended:
            axes.plot(
                ended,
                [0.02] * len(ended),
                marker,
                color="#A63603",
                transform=axes.get_xaxis_transform(),
                label=state,
                markersize=6,
            )
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(study.metrics[0])
    axes.set_title(f"History: {study.algorithm}, {len(study.rows)} trials")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


@styled
def parallel_coordinates(study: Study) -> bytes:
    """A line per trial through its values, coloured by the objective; the best one is drawn last and thick."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = study.space.order()[:_WIDEST]
    done = study.ends
    figure, axes = new_figure(1.9 + 1.45 * (len(names) + 1), 4.4)
    values = np.array([(row.objective or [math.nan])[0] for row in done])
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    colours = colormaps["cividis"]
    good = study.modes[0] == "max"
    best = best_row(study.rows, study.modes)
    ranked = sorted(zip(done, values, strict=True), key=lambda item: item[1] if good else -item[1])
    for row, value in sorted(ranked, key=lambda item: best is not None and item[0].number == best.number):
        heights = [_height(study.space.dimensions[name], row.values.get(name)) for name in names]
        own = best is not None and row.number == best.number
        share = (value - low) / span
        axes.plot(
            range(len(names) + 1),
            [*heights, share],
            color="#D55E00" if own else colours(share if good else 1 - share),
            linewidth=2.6 if own else 1.2,
            alpha=1.0 if own else 0.7,
            marker="o",
            markersize=3,
        )
    for place, name in enumerate(names):
        _scale(axes, place, study.space.dimensions[name])
    for share, value in ((0.0, low), (1.0, high)):
        axes.text(len(names) + 0.06, share, f"{value:.4g}", va="center", fontsize=8)
    axes.set_xticks(range(len(names) + 1), [*(named(name, names) for name in names), study.metrics[0]], rotation=20)
    axes.set_ylim(-0.14, 1.06)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    for place in range(len(names) + 1):
        axes.axvline(place, color="#BBBBBB", linewidth=0.8, zorder=0)
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), colours if good else colours.reversed()), ax=axes, fraction=0.04, pad=0.05
    )
    bar.set_label(study.metrics[0])
    what = "last settings of every member" if study.segmented else "the best trial"
    axes.set_title(f"Parallel coordinates; {what}{', the best' if study.segmented else ''} in red")
    return png(figure)


def _height(dimension: Dimension, value: Any) -> float:
    """Place on an axis, 0 .. 1; below it for a dimension that the trial does not have."""
    if value is None and (dimension.choice is None or None not in dimension.choice):
        return -0.1
    if dimension.choice is not None:
        texts = [identity(item) for item in dimension.choice]
        return texts.index(identity(value)) / max(1, len(texts) - 1) if len(texts) > 1 else 0.5
    return dimension.share(value)


def _scale(axes: Any, place: int, dimension: Dimension) -> None:
    """The values at an axis."""
    if dimension.choice is not None:
        marks = [(_height(dimension, value), cell(value)) for value in dimension.choice[:12]]
    else:
        low, high = dimension.bounds
        marks = [(share, f"{dimension.at(min(share, 1 - 1e-12)):g}") for share in (0.0, 0.5, 1.0)]
        marks[0], marks[-1] = (0.0, f"{low:g}"), (1.0, f"{high:g}")
    for height, text in marks:
        axes.text(place + 0.04, height, text[:14], va="center", fontsize=8, color="#222222")
    if dimension.when:
        axes.text(place + 0.04, -0.1, "not there", va="center", fontsize=7.5, color="#777777")


@styled
def importance_bars(shares: Mapping[str, float], count: int, segmented: bool = False) -> bytes:
    """Bars of :func:`importance`, the largest on top."""
    names = sorted(shares, key=lambda name: shares[name])
    figure, axes = new_figure(6.4, 1.3 + 0.36 * len(names))
    axes.barh(range(len(names)), [shares[name] for name in names], color=AFTER, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.12)
    for place, name in enumerate(names):
        axes.text(shares[name] + 0.012, place, f"{shares[name]:.2f}", va="center", fontsize=8.5)
    what = "variance of the gain in a segment" if segmented else "variance"
    axes.set_xlabel(f"share of the {what} explained (fANOVA)")
    axes.grid(axis="y", visible=False)
    axes.set_title(f"Importance, from {count} trials")
    return png(figure)


@styled
def pareto(study: Study) -> bytes:
    """Two objectives against each other; the front as a line."""
    figure, axes = new_figure(5.6, 4.0)
    done, kept = study.done, front(study.rows, study.modes)
    points = [row.objective or [] for row in done]
    axes.plot([p[0] for p in points], [p[1] for p in points], "o", color=PALETTE[7], markersize=5, label="trials")
    ahead = sorted((row.objective or [] for row in kept), key=lambda p: p[0])
    axes.plot([p[0] for p in ahead], [p[1] for p in ahead], "-s", color=AFTER, markersize=6, label="Pareto front")
    best = best_row(study.rows, study.modes)
    if best is not None and best.objective:
        axes.plot(*best.objective[:2], "*", color="#D55E00", markersize=14, label=f"given out (trial {best.number})")
    axes.set_xlabel(f"{study.metrics[0]} ({study.modes[0]})")
    axes.set_ylabel(f"{study.metrics[1]} ({study.modes[1]})")
    axes.set_title("Pareto front")
    axes.legend(frameon=False, fontsize=8.5)
    return png(figure)
