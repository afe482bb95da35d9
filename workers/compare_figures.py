"""Figures of a comparison as PNG bytes, from plain numbers: what the page of ``moepipe compare`` shows.

Style, colours and determinism are those of :mod:`workers.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.figures import MARKERS, PALETTE, new_figure, png, styled

_MOST_ROWS, _MOST_NAMED = 40, 24


@dataclass(frozen=True)
class Line:
    """One row of a comparison, ready to be drawn.

    Attributes:
        label: for people.
        domains: (mean, standard error or 0) by domain; None where it has none.
        average: (mean, standard error or 0).
        worst: mean of the worst domain.
        difference: (mean, low, high) to the baseline; low and high are None without an interval.
        significant: the difference is marked.
        hours: device-hours, or None.
        flops: of an image, or None.
    """

    label: str
    domains: Sequence[tuple[float, float] | None]
    average: tuple[float, float]
    worst: float
    difference: tuple[float, float | None, float | None] | None = None
    significant: bool = False
    hours: float | None = None
    flops: float | None = None


def _marker(number: int) -> str:
    """Another marker when the colours begin anew."""
    return MARKERS[(number + number // len(PALETTE)) % len(MARKERS)]


@styled
def domain_points(lines: Sequence[Line], domains: Sequence[str], unit: str) -> bytes:
    """Score by domain and row: points with standard errors, one band of rows for each domain, averages at the right."""
    shown = lines[:_MOST_NAMED]
    names = [*domains, "average"] if len(domains) > 1 else list(domains)
    figure, axes = new_figure(min(12.0, max(6.8, 1.6 + 0.4 * len(names) + 0.1 * len(names) * len(shown))), 4.2)
    width = 0.76 / len(shown)
    for number, line in enumerate(shown):
        cells = [*line.domains, line.average] if len(domains) > 1 else list(line.domains)
        places = [place for place, cell in enumerate(cells) if cell is not None]
        values = [cell for cell in cells if cell is not None]
        axes.errorbar(
            [place - 0.38 + width * (number + 0.5) for place in places],
            [mean for mean, _ in values],
            yerr=[error for _, error in values],
            fmt=_marker(number),
            color=PALETTE[number % len(PALETTE)],
            markersize=6,
            elinewidth=1.2,
            capsize=2,
            label=line.label,
        )
    for place in range(len(names) - 1):
        axes.axvline(place + 0.5, color="#D8D8D8", linewidth=0.8)
    crowded = len(names) > 6
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(unit)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    more = f" (the first {len(shown)} of {len(lines)} rows)" if len(lines) > len(shown) else ""
    axes.set_title(f"Score by domain, mean and standard error over seeds{more}")
    return png(figure)


@styled
def differences(lines: Sequence[Line], baseline: str, unit: str) -> bytes:
    """Paired differences to the baseline with 95% intervals; filled where significant after correction."""
    shown = [line for line in lines if line.difference is not None][:_MOST_ROWS][::-1]
    figure, axes = new_figure(7.2, 1.2 + 0.34 * max(1, len(shown)))
    for place, line in enumerate(shown):
        mean, low, high = line.difference or (0.0, None, None)
        colour = PALETTE[0] if mean >= 0 else PALETTE[1]
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.7)
        axes.plot(mean, place, "o", color=colour, markerfacecolor=colour if line.significant else "white", markersize=7)
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(shown)), [line.label for line in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference to {baseline}, {unit}")
    axes.set_title("Paired differences, 95% bootstrap intervals")
    return png(figure)


@styled
def cost_points(lines: Sequence[Line], unit: str, by: str) -> bytes:
    """Score against a cost: ``hours`` of training or ``flops`` of an image; the upper left is best."""
    figure, axes = new_figure(6.8, 4.0)
    shown = [(number, line) for number, line in enumerate(lines) if getattr(line, by)][:_MOST_ROWS]
    for number, line in shown:
        axes.errorbar(
            getattr(line, by),
            line.average[0],
            yerr=line.average[1],
            fmt=_marker(number),
            color=PALETTE[number % len(PALETTE)],
            markersize=7,
            capsize=2,
            elinewidth=1.2,
            label=line.label if number < _MOST_NAMED else None,
        )
    values = [getattr(line, by) for _, line in shown]
    if max(values) > 10 * min(values):
        axes.set_xscale("log")
    axes.set_xlabel("device-hours to train one model" if by == "hours" else "floating point operations of one image")
    axes.set_ylabel(unit)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.set_title("Score against training cost" if by == "hours" else "Score against cost of a prediction")
    return png(figure)
