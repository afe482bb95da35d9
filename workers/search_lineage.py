"""What a population leaves behind besides its table: who copied whom, how settings changed, the winner's schedule.

The schedule is a config of its own (``algorithm: schedule``): with the same seed it gives the winner's bytes, with
other seeds or data it is a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workers.figures import PALETTE, new_figure, png, styled
from workers.search_report import Row, Study, best_row, cell, named
from workers.search_space import Dimension, identity

_MOST_PANELS = 6
BEST = "#D55E00"


def chain(rows: Sequence[Row], number: int) -> list[Row]:
    """The segments that trial ``number`` consists of, from the first on."""
    by_number = {row.number: row for row in rows}
    found = [by_number[number]]
    while (parent := _segment(found[-1])["parent"]) is not None:
        found.append(by_number[parent])
    return found[::-1]


def schedule(rows: Sequence[Row], number: int) -> list[dict[str, Any]]:
    """The settings of a trial over its whole training: ``until`` (updates), ``values``, and the trials it ran in."""
    parts: list[dict[str, Any]] = []
    for row in chain(rows, number):
        if parts and identity(parts[-1]["values"]) == identity(row.values):
            parts[-1]["until"] = _segment(row)["until"]
            parts[-1]["trials"].append(row.number)
        else:
            parts.append({"until": _segment(row)["until"], "values": dict(row.values), "trials": [row.number]})
    return parts


def schedule_table(rows: Sequence[Row], number: int) -> str:
    """:func:`schedule` as Markdown, a line per change."""
    parts = schedule(rows, number)
    names = sorted({name for part in parts for name in part["values"]})
    head = ["updates", *names, "trials"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    begin = 0
    for part in parts:
        values = [cell(part["values"][name]) if name in part["values"] else "" for name in names]
        lines.append(" | ".join([f"{begin} to {part['until']}", *values, ", ".join(map(str, part["trials"]))]))
        begin = part["until"]
    return "".join(f"| {line} |\n" for line in lines)


def figures(study: Study) -> dict[str, bytes]:
    """Name -> PNG: scores over updates, settings over updates, and the tree of copies."""
    if not study.done:
        return {}
    drawn = {"history": history(study), "lineage": lineage(study)}
    if study.space.dimensions:
        drawn["schedule"] = settings_over_updates(study)
    return drawn


def _segment(row: Row) -> Mapping[str, Any]:
    return row.segment or {"parent": None, "until": 0, "member": 0, "generation": 0, "copied": False, "left": 0}


def _winners(study: Study) -> set[int]:
    best = best_row(study.rows, study.modes)
    return set() if best is None else {row.number for row in chain(study.rows, best.number)}


def _score(row: Row) -> float:
    return (row.objective or [math.nan])[0]


@styled
def history(study: Study) -> bytes:
    """The score of every member over the updates; dotted: a copy leaves its member for another one's state."""
    figure, axes = new_figure(7.2, 4.0)
    rows = {row.number: row for row in study.rows}
    winners = _winners(study)
    for row in sorted(study.done, key=lambda row: row.number in winners):
        own = _segment(row)
        parent = rows.get(-1 if own["parent"] is None else own["parent"])
        colour = BEST if row.number in winners else PALETTE[0]
        weight = 2.4 if row.number in winners else 0.9
        if parent is not None and parent.objective:
            x, y = [_segment(parent)["until"], own["until"]], [_score(parent), _score(row)]
            axes.plot(x, y, ":" if own["copied"] else "-", color=colour, linewidth=weight, alpha=0.9)
        axes.plot([own["until"]], [_score(row)], "o", color=colour, markersize=4.5)
    handles = [
        axes.plot([], [], "-o", color=PALETTE[0], label="a member goes on")[0],
        axes.plot([], [], ":o", color=PALETTE[0], label="goes on from another one's state")[0],
        axes.plot([], [], "-o", color=BEST, linewidth=2.4, label="given out")[0],
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xlabel("updates")
    axes.set_ylabel(study.metrics[0])
    members = 1 + max(_segment(row)["member"] for row in study.rows)
    axes.set_title(f"History of {members} members")
    return png(figure)


@styled
def lineage(study: Study) -> bytes:
    """Members as rows, updates as columns: each segment in the colour of its score, each copy as an arrow."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    members = 1 + max(_segment(row)["member"] for row in study.rows)
    figure, axes = new_figure(7.4, 1.4 + 0.32 * members)
    scores = np.array([_score(row) for row in study.done])
    norm = Normalize(float(scores.min()), float(scores.max()) or 1.0)
    colours = colormaps["cividis"] if study.modes[0] == "max" else colormaps["cividis"].reversed()
    rows, winners = {row.number: row for row in study.rows}, _winners(study)
    interval = min(_segment(row)["until"] for row in study.rows)
    for row in study.rows:
        own = _segment(row)
        parent = rows.get(-1 if own["parent"] is None else own["parent"])
        begin = own["until"] - interval if parent is None else _segment(parent)["until"]
        end = own["until"]
        if row.objective:
            axes.plot([begin, end], [own["member"]] * 2, color=colours(norm(_score(row))), linewidth=7, zorder=2,
                      solid_capstyle="butt")  # fmt: skip
        else:
            axes.plot([(begin + end) / 2], [own["member"]], "x", color="#A63603", markersize=7, zorder=3)
        if row.number in winners:
            axes.plot([begin, end], [own["member"]] * 2, color=BEST, linewidth=2, zorder=4)
        if parent is not None and own["copied"]:
            colour = BEST if row.number in winners else "#666666"
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6 if row.number in winners else 0.9}
            to, start = (begin, own["member"]), (begin, _segment(parent)["member"])
            axes.annotate("", to, start, arrowprops={**arrow, "shrinkA": 3, "shrinkB": 3}, zorder=5)
    axes.set_yticks(range(members), [f"member {number}" for number in range(members)] if members <= 12 else None)
    axes.set_ylim(members - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("updates")
    axes.grid(axis="y", visible=False)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(study.metrics[0])
    axes.set_title("Lineage: who went on from whom; given out in red")
    return png(figure)


@styled
def settings_over_updates(study: Study) -> bytes:
    """A panel per field: its value over the updates for every member, and for the one that is given out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = study.space.order()[:_MOST_PANELS]
    figure = Figure(figsize=(7.2, 0.9 + 1.5 * len(names)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    best = best_row(study.rows, study.modes)
    ends = sorted({_segment(row)["until"] for row in study.rows})
    before = {end: start for start, end in zip([0, *ends], ends, strict=False)}
    lines = [([row], "#AAAAAA", 1.0) for row in study.rows]
    if best is not None:
        lines.append((chain(study.rows, best.number), BEST, 2.4))
    for panel, name in zip(panels, names, strict=True):
        dimension = study.space.dimensions[name]
        for rows, colour, width in lines:
            x, y = [], []
            for row in rows:
                height = _height(dimension, row.values.get(name))
                x += [before[_segment(row)["until"]], _segment(row)["until"]]
                y += [height, height]
            panel.plot(x, y, color=colour, linewidth=width, alpha=1.0 if colour == BEST else 0.8)
        if dimension.log:
            panel.set_yscale("log")
        if dimension.choice is not None:
            panel.set_yticks(range(len(dimension.choice)), [cell(value)[:16] for value in dimension.choice])
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylabel(named(name, study.space.order()))
    panels[-1].set_xlabel("updates")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_title("Settings over the updates: every member, and in red the one given out")
    return png(figure)


def _height(dimension: Dimension, value: Any) -> float:
    """A value as a number; NaN where the field does not exist."""
    if dimension.choice is not None:
        texts = [identity(item) for item in dimension.choice]
        return float(texts.index(identity(value))) if identity(value) in texts else math.nan
    return math.nan if value is None else float(value)
