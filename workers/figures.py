"""Figures of a report as PNG bytes: the same input gives the same bytes.

Colours are those of Okabe & Ito and of the ``cividis`` map, both readable with colour-vision deficiencies; lines differ
by marker as well. Figures are drawn on white, whatever the page's theme. Matplotlib is used without pyplot, so nothing
global changes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError
from workers.evaluation_result import EvaluationResult, order_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER = "#E69F00", "#0072B2"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DPI = 144
_MOST_DOMAINS = 60  # more than this many bars cannot be told apart on a page
_MOST_PANELS = 4
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "svg.hashsalt": "moepipe",
}


P = ParamSpec("P")


def styled(draw: Callable[P, bytes]) -> Callable[P, bytes]:
    """Run ``draw`` under this module's style and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def domain_bars(results: Sequence[EvaluationResult], before: str, after: str) -> bytes:
    """Horizontal bars per domain: the score of method ``before`` and of method ``after``, averaged over the seeds.

    Whiskers are standard deviations over seeds; the signed mean difference stands at the right. With more than 60
    domains those that change most are shown, and the title says so.

    Raises:
        DataError: no results, or results with different domains.
    """
    _same_domains(results)
    first = results[0]
    low = np.array([result.method(before).domain_scores for result in results])
    high = np.array([result.method(after).domain_scores for result in results])
    gains = (high - low).mean(axis=0)
    shown = np.argsort(-np.abs(gains), kind="stable")[:_MOST_DOMAINS]
    shown = shown[np.argsort(low.mean(axis=0)[shown], kind="stable")]
    scale, unit = _scale(first)
    figure, axes = new_figure(7.6, 1.5 + 0.38 * len(shown))
    place = np.arange(len(shown))
    for values, offset, colour, name in ((low, 0.19, BEFORE, before), (high, -0.19, AFTER, after)):
        axes.barh(
            place + offset,
            values.mean(axis=0)[shown] * scale,
            height=0.36,
            color=colour,
            label=first.method(name).label,
            xerr=values.std(axis=0, ddof=1)[shown] * scale if len(results) > 1 else None,
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        )
    axes.set_yticks(place, [f"{first.domains[i]}  (n={first.counts[i]})" for i in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    if first.task != "regression":
        axes.set_xlim(0, 100)
    axes.set_xlabel(unit)
    for position, index in zip(place, shown, strict=True):
        axes.annotate(
            _signed(gains[index] * scale, first),
            (1.012, position),
            xycoords=("axes fraction", "data"),
            va="center",
            annotation_clip=False,
            color=AFTER if gains[index] >= 0 else "#A63603",
        )
    axes.grid(axis="y", visible=False)
    hidden = len(first.domains) - len(shown)
    axes.set_title(
        "Before and after adaptation, by domain" + (f" ({hidden} that change least left out)" if hidden else ""), pad=26
    )
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles, names, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, borderpad=0.1)
    return png(figure)


@styled
def method_bars(results: Sequence[EvaluationResult]) -> bytes:
    """Horizontal bars per method: the selection metric, mean over the seeds, with a dot for every seed.

    A model as it is has a dark bar, the same model with an adaptation a light one below it.

    Raises:
        DataError: no results.
    """
    if not results:
        raise DataError("There are no results to draw.", "Evaluate at least one seed.")
    metric, rows = results[0].metric, order_of(results)
    found = {name: [m for r in results for m in r.methods if m.name == name] for name, _ in rows}
    scale, unit = _scale(results[0], metric)
    figure, axes = new_figure(7.6, 1.1 + 0.24 * len(rows))
    for place, (name, _) in enumerate(rows):
        values = np.array([method.scores[metric] for method in found[name]]) * scale
        adapted = any(method.reference for method in found[name])
        axes.barh(place, values.mean(), height=0.72, color=PALETTE[4] if adapted else PALETTE[0])
        axes.scatter(values, np.full(len(values), place), s=9, color="#222222", zorder=3, linewidths=0)
    axes.set_yticks(range(len(rows)), [label for _, label in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if results[0].task != "regression":
        axes.set_xlim(0, 100)
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    axes.set_title("Every method; a dot is a seed")
    return png(figure)


@styled
def attention_map(results: Sequence[EvaluationResult]) -> bytes:
    """Heat maps of the attention that each expert (columns) receives from each domain (rows), one panel per seed.

    Seeds divide the training domains differently over the experts, so their maps are not averaged; the first four are
    shown. The scale is centred on an even share: lighter than the middle means listened to more than others.

    Raises:
        DataError: no result has attention, or they do not fit together.
    """
    found = [(result.seed, result.attention) for result in results if result.attention is not None][:_MOST_PANELS]
    if not found or any(
        m.domains != found[0][1].domains or len(m.experts) != len(found[0][1].experts) for _, m in found
    ):
        raise DataError("There is no attention to draw, or it is of different domains.", "Evaluate the aggregator.")
    experts, domains = found[0][1].experts, found[0][1].domains
    even = 1 / len(experts)
    spread = max(*(abs(share - even) for _, m in found for row in m.mass for share in row), 1e-3)
    width = 2.6 + (0.3 + 0.5 * len(experts)) * len(found)
    figure, _ = new_figure(width, 1.5 + 0.32 * len(domains), panels=len(found))
    for axes, (seed, attention) in zip(figure.axes, found, strict=True):
        mass = np.array(attention.mass)
        image = axes.imshow(mass, cmap="cividis", aspect="auto", vmin=max(0.0, even - spread), vmax=even + spread)
        names = [name.removeprefix("expert ") for name in attention.experts]
        axes.set_xticks(np.arange(len(names)), names, rotation=45 if max(map(len, names)) > 5 else 0)
        axes.set_yticks(np.arange(len(domains)), domains)
        axes.set_xlabel("expert" if len(found) == 1 else f"expert (seed {seed})")
        axes.grid(visible=False)
        for row, column in np.ndindex(mass.shape) if mass.size <= 600 else ():
            value = float(mass[row, column])
            colour = "black" if value > even + 0.1 * spread else "white"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.05, pad=0.02)
    bar.set_label(f"attention (even share {100 * even:.0f}%)")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    figure.axes[0].set_title("Attention by expert, in %", loc="left")
    return png(figure)


@styled
def adaptation_curve(results: Sequence[EvaluationResult]) -> bytes:
    """Score over the number of unlabelled images adapted on, a line per method, mean over seeds with a band of one std.

    Raises:
        DataError: no result holds a curve.
    """
    curves = [curve for result in results for curve in result.curves]
    if not curves:
        raise DataError("There is no adaptation curve to draw.", "Evaluate several support sizes.")
    scale, unit = _scale(results[0], results[0].metric)
    figure, axes = new_figure(6.8, 4.0)
    sizes = sorted({size for curve in curves for size in curve.support})
    place = {size: index for index, size in enumerate(sizes)}
    for number, name in enumerate(dict.fromkeys(curve.method for curve in curves)):
        own = [curve for curve in curves if curve.method == name]
        support = [size for size in sizes if all(size in curve.support for curve in own)]
        scores = np.array([[curve.score[curve.support.index(size)] for size in support] for curve in own]) * scale
        x = [place[size] for size in support]
        _line(axes, x, scores, number, own[0].label)
    axes.set_xticks(list(place.values()), [str(size) if size else "none" for size in sizes])
    axes.set_xlabel("unlabelled images of the domain used to adapt")
    axes.set_ylabel(unit)
    axes.set_title("Adaptation over support size")
    axes.legend(frameon=False, fontsize=8.5)
    return png(figure)


@styled
def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], key: str, title: str) -> bytes:
    """``key`` (a loss or a score) over the step, a line per training.

    Args:
        histories: label -> records that hold ``step`` and, some of them, ``key``.
        key: what to draw.
        title: of the figure.

    Raises:
        DataError: no record has ``key``.
    """
    figure, axes = new_figure(6.8, 3.8)
    drawn = 0
    for number, (label, records) in enumerate(histories.items()):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            x, y = zip(*points, strict=True)
            _line(axes, list(x), np.array([y]), number, label, marker=len(points) <= 40)
            drawn += 1
    if not drawn:
        raise DataError(f"No training recorded {key!r}.", "Check the name of the value.")
    axes.set_xlabel("update")
    axes.set_ylabel(key)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8.5, ncols=1 + (drawn > 6))
    return png(figure)


def _line(axes: Axes, x: Sequence[float], rows: NDArray[Any], number: int, label: str, marker: bool = True) -> None:
    colour = PALETTE[number % len(PALETTE)]
    sign = MARKERS[number % len(MARKERS)] if marker else None
    axes.plot(x, rows.mean(axis=0), color=colour, marker=sign, markersize=5, linewidth=1.8, label=label)
    if len(rows) > 1:
        std = rows.std(axis=0, ddof=1)
        axes.fill_between(x, rows.mean(axis=0) - std, rows.mean(axis=0) + std, color=colour, alpha=0.15, linewidth=0)


def _same_domains(results: Sequence[EvaluationResult]) -> None:
    if not results or any(result.domains != results[0].domains for result in results):
        raise DataError("There are no evaluations, or they are of different domains.", "Draw one data set at a time.")


def _scale(result: EvaluationResult, metric: str = "accuracy") -> tuple[float, str]:
    if result.task == "regression":
        return 1.0, "Pearson r"
    return 100.0, f"{metric.replace('_', ' ')} (%)"


def _signed(value: float, result: EvaluationResult) -> str:
    return f"{value:+.3f}" if result.task == "regression" else f"{value:+.1f}"


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Axes]:
    """A figure of that many panels side by side on one y axis, and its first panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    first: Axes = all_axes[0]
    return figure, first


def png(figure: Figure) -> bytes:
    """The picture's bytes; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()
