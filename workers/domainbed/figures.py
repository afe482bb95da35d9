"""Figures of a sweep as PNG bytes, in the style of :mod:`workers.figures`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.domainbed.records import Record
from workers.domainbed.report import Table
from workers.figures import MARKERS, PALETTE, new_figure, png, styled


@styled
def accuracy_points(table: Table) -> bytes:
    """One group per held-out domain, one point per algorithm, whiskers are standard errors over trials."""
    rows = [row for row in table.rows if any(cell is not None for cell in row.cells)]
    figure, axes = new_figure(max(4.2, 1.4 + len(table.columns) * (0.5 + 0.28 * len(rows))), 3.6)
    place, width = np.arange(len(table.columns)), 0.6 / max(1, len(rows))
    for number, row in enumerate(rows):
        axes.errorbar(
            place + (number - (len(rows) - 1) / 2) * width,
            [np.nan if cell is None else cell.mean for cell in row.cells],
            yerr=[np.nan if cell is None or cell.trials == 1 else cell.error for cell in row.cells],
            fmt=MARKERS[number % len(MARKERS)],
            color=PALETTE[number % len(PALETTE)],
            capsize=3,
            ms=7,
            label=row.algorithm,
        )
    axes.set_xticks(place, table.columns)
    axes.set_xlim(-0.6, len(table.columns) - 0.4)
    axes.margins(y=0.15)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("held-out domain")
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


@styled
def routing_maps(tables: Sequence[dict[str, Any]], group: str, rows: Sequence[str]) -> bytes:
    """Share of each group's tokens that go to each expert, one panel per sparse layer, mean over the runs.

    Args:
        tables: ``layers`` of ``routing.json``, one per run.
        group: ``by_domain`` or ``by_class``.
        rows: names of the groups.
    """
    layers = sorted(tables[0], key=_block_number)
    experts = len(tables[0][layers[0]]["load"])
    width = max(3.2, 1.2 + 0.28 * experts)
    figure, axes = new_figure(width * len(layers) + 0.8, 1.3 + 0.34 * len(rows), panels=len(layers))
    for panel, layer in zip(figure.axes, layers, strict=True):
        shares = np.mean([table[layer][group]["shares"] for table in tables], axis=0)
        information = float(np.mean([table[layer][group]["normalised_information"] for table in tables]))
        image = panel.imshow(shares, cmap="cividis", vmin=0.0, aspect="auto")
        panel.set_title(f"block {_block_number(layer)}: shared information {information:.3f}", fontsize=9)
        panel.set_xlabel("expert")
        panel.grid(visible=False)
        figure.colorbar(image, ax=panel, shrink=0.85)
    axes.set_yticks(range(len(rows)), rows)
    return png(figure)


def _block_number(layer: str) -> int:
    """Number of the transformer block in a layer's name; 0 for a layer outside of blocks."""
    found = re.search(r"blocks?\.(\d+)", layer)
    return int(found.group(1)) if found else 0


@styled
def attention_grid(images: NDArray[Any], maps: NDArray[Any], labels: Sequence[str]) -> bytes:
    """One image per domain above the attention of the class token in the last block.

    Args:
        images: ``[D, C, H, W]``, normalised somehow; stretched to the full range for display.
        maps: ``[D, h, w]``.
        labels: name of each domain.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(labels), 3.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(labels), squeeze=False)
    for column, label in enumerate(labels):
        picture = images[column].transpose(1, 2, 0)[:, :, :3].astype(np.float64)
        span = picture.max() - picture.min()
        shown = (picture - picture.min()) / (span if span > 0 else 1.0)
        panels[0][column].imshow(shown if shown.shape[2] == 3 else shown[:, :, 0], cmap="gray")
        panels[1][column].imshow(maps[column], cmap="cividis")
        panels[0][column].set_title(label, fontsize=9)
    for panel in panels.flat:
        panel.set_axis_off()
    return png(figure)
