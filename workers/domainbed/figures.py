"""Figures of a sweep as PNG bytes, in the style of :mod:`workers.figures`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workers.domainbed.records import Record
from workers.domainbed.report import Table
from workers.figures import MARKERS, PALETTE, new_figure, png, styled


@styled
def accuracy_bars(table: Table) -> bytes:
    """One group of bars per held-out domain, one bar per algorithm, whiskers are standard errors over trials."""
    rows = [row for row in table.rows if any(cell is not None for cell in row.cells)]
    figure, axes = new_figure(max(6.0, 1.1 + len(table.columns) * (0.5 + 0.3 * len(rows))), 3.6)
    place, width = np.arange(len(table.columns)), 0.8 / max(1, len(rows))
    lows = []
    for number, row in enumerate(rows):
        means = np.array([np.nan if cell is None else cell.mean for cell in row.cells])
        errors = np.array([0.0 if cell is None else cell.error for cell in row.cells])
        lows += [low for low in means - errors if np.isfinite(low)]
        axes.bar(
            place + (number - (len(rows) - 1) / 2) * width,
            means,
            width * 0.92,
            yerr=errors if errors.any() else None,
            color=PALETTE[number % len(PALETTE)],
            label=row.algorithm,
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks(place, table.columns)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("held-out domain")
    axes.set_ylim(max(0.0, float(np.floor(min(lows, default=0.0) / 10) * 10 - 5)), None)
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, ncols=min(4, len(rows)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return png(figure)


@styled
def learning_curves(records: Sequence[Record], dataset: str) -> bytes:
    """Mean ``out`` accuracy of the training domains against updates, by algorithm; the band is the range over runs."""
    figure, axes = new_figure(7.2, 3.6)
    own = [record for record in records if record.dataset == dataset]
    for number, name in enumerate(dict.fromkeys(record.algorithm for record in own)):
        by_step: dict[int, list[float]] = {}
        for record in own:
            if record.algorithm == name:
                kept = [a for env, a in enumerate(record.out_acc) if env not in record.test_envs]
                by_step.setdefault(record.step, []).append(100 * float(np.mean(kept)))
        steps = sorted(by_step)
        colour = PALETTE[number % len(PALETTE)]
        axes.fill_between(
            steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=colour, alpha=0.15, lw=0
        )
        means = [float(np.mean(by_step[step])) for step in steps]
        axes.plot(steps, means, color=colour, marker=MARKERS[number % len(MARKERS)], ms=3.5, label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("validation accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    return png(figure)
