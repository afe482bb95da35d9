"""``--sweep PATH=A,B,C``: one submission that runs a pipeline at every point of a grid.

The pipeline is read once for each point, as ``--set`` would read it, and the readings are put into one specification:
stages that are the same at all points stand there once, the others once per variant. Variants keep the seeds and so the
artifacts of the stage that they come from: a point that is submitted alone later is a hit.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moe.errors import NotFoundError, SpecError
from orchestrator.graph import Graph, build_graph
from orchestrator.loading import Loaded, load
from orchestrator.references import stage_name
from orchestrator.search_check import numbers
from orchestrator.spec import PipelineSpec, StageSpec
from orchestrator.store import Store
from orchestrator.yaml_reader import read_value

MAX_POINTS = 1000
_COLUMNS = 6
_LONGEST = 60


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        values: path -> value as written.
        stages: stage of the pipeline -> its name in the specification of all points.
    """

    values: Mapping[str, str]
    stages: Mapping[str, str]


@dataclass(frozen=True)
class Swept:
    """A pipeline at all points.

    Attributes:
        spec: all of it.
        graph: its expansion.
        points: in grid order, the last path changing fastest.
        warnings: what to tell of any of the points, each once.
    """

    spec: PipelineSpec
    graph: Graph
    points: tuple[Point, ...]
    warnings: tuple[str, ...] = ()

    def record(self) -> list[dict[str, Any]]:
        """The points as JSON, for the run record."""
        return [{"values": dict(point.values), "stages": dict(point.stages)} for point in self.points]


def parse_sweeps(texts: Sequence[str]) -> dict[str, list[str]]:
    """``PATH=A,B,C`` texts -> path -> values as written; commas inside brackets and quotes do not part values.

    Raises:
        SpecError: a text of another form, a path twice, or one value only.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        path, equals, values = text.partition("=")
        path = path.strip()
        found = _split(values)
        if not equals or not path or len(found) < 2 or not all(found):
            hint = "For example: --sweep stages.distill.config.training.student_lr=1e-4,3e-4"
            raise SpecError(f"--sweep needs PATH=VALUE,VALUE,..., found {text!r}.", hint)
        if path in axes:
            raise SpecError(f"--sweep names {path!r} twice.", "Write all of its values into one.")
        if path.partition(".")[0].partition("[")[0] in ("seeds", "name", "tracking", "apiVersion"):
            raise SpecError(f"{path!r} cannot be swept.", "For seeds use --seeds 0,1,2.")
        if len({json.dumps(read_value(value, "--sweep").plain(), default=str) for value in found}) < len(found):
            raise SpecError(f"--sweep {path} has a value twice.")
        axes[path] = found
    return axes


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def load_sweep(path: Path, profile: str | None, overrides: Sequence[str], sweeps: Sequence[str]) -> Swept:
    """Read a pipeline at every point of a grid.

    Raises:
        SpecErrors: what is wrong at one of the points; its values are named ``--set #n`` after those of the user.
        SpecError: no stage depends on a swept path.
    """
    axes = parse_sweeps(sweeps)
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(grid) > MAX_POINTS:
        raise SpecError(f"The sweep has {len(grid)} points, at most {MAX_POINTS} are allowed.")
    read = [load(path, profile, [*overrides, *(f"{k}={v}" for k, v in point.items())]) for point in grid]
    return merge(read, grid)


def merge(read: Sequence[Loaded], grid: Sequence[Mapping[str, str]]) -> Swept:
    """One specification out of those of all points."""
    signatures = [_signatures(loaded) for loaded in read]
    stages: dict[str, StageSpec] = {}
    names: list[dict[str, str]] = [{} for _ in grid]
    for stage in dict.fromkeys(name for loaded in read for name in loaded.graph.stages):
        groups: dict[str, list[int]] = {}
        for index, own in enumerate(signatures):
            if stage in own:
                groups.setdefault(own[stage], []).append(index)
        shared = len(groups) == 1 and len(next(iter(groups.values()))) == len(grid)
        for number, members in enumerate(groups.values()):
            name = stage if shared else _name(stage, _label(members, grid), number, stages)
            loaded = read[members[0]]
            for index in members:
                names[index][stage] = name
            stages[name] = _variant(loaded.spec.stages[stage], stage, names[members[0]], shared)
    points = tuple(Point(dict(values), own) for values, own in zip(grid, names, strict=True))
    idle = [path for path in grid[0] if not _matters(path, points)]
    if idle:
        raise SpecError(f"No stage depends on {idle[0]!r}: every value gives the same results.", "Sweep another path.")
    first = read[0].spec
    spec = first.model_copy(update={"stages": stages})
    told = dict.fromkeys(str(warning) for loaded in read for warning in loaded.warnings)
    return Swept(spec, build_graph(spec), points, tuple(told))


def _matters(path: str, points: Sequence[Point]) -> bool:
    """Whether two points that differ in ``path`` alone have different stages."""
    seen: dict[str, Mapping[str, str]] = {}
    for point in points:
        rest = json.dumps({name: value for name, value in point.values.items() if name != path})
        if rest in seen and seen[rest] != point.stages:
            return True
        seen.setdefault(rest, point.stages)
    return False


def _signatures(loaded: Loaded) -> dict[str, str]:
    """Stage -> text that is equal where the stage and all that it reads is equal."""
    found: dict[str, str] = {}
    for name in loaded.graph.stages:  # in topological order
        spec = loaded.spec.stages[name]
        inputs = {port: [found[up] for up in loaded.graph.stages[name].inputs[port]] for port in spec.inputs}
        whole = {**spec.model_dump(mode="json"), "inputs": inputs}
        found[name] = json.dumps(whole, sort_keys=True)
    return found


def _label(members: Sequence[int], grid: Sequence[Mapping[str, str]]) -> str:
    """The values that these points have in common and others have not."""
    parts = []
    for path in grid[0]:
        own = {grid[index][path] for index in members}
        if len(own) == 1 and len({point[path] for point in grid}) > 1:
            parts.append(f"{path.rpartition('.')[2]}-{own.pop()}")
    return "--".join(parts)


def _name(stage: str, label: str, number: int, taken: Mapping[str, StageSpec]) -> str:
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", label).strip("_")
    name = f"{stage}--{clean}"
    if not clean or len(name) > _LONGEST or name in taken:
        name = f"{stage[: _LONGEST - 8]}--{number}"
    return name


def _variant(spec: StageSpec, stage: str, names: Mapping[str, str], shared: bool) -> StageSpec:
    """A stage that reads the right variants, with the seeds of the stage that it comes from."""
    if shared:
        return spec
    inputs: dict[str, str | list[str]] = {}
    for port, value in spec.inputs.items():
        texts = [_renamed(text, names) for text in ([value] if isinstance(value, str) else value)]
        inputs[port] = texts[0] if isinstance(value, str) else texts
    return spec.model_copy(update={"inputs": inputs, "seed_name": spec.seed_name or stage})


def _renamed(text: str, names: Mapping[str, str]) -> str:
    name = stage_name(text) or ""
    return f"${{stages.{names.get(name, name)}}}"


def sweep_table(
    points: Sequence[Mapping[str, Any]], graph: Graph, artifacts: Mapping[str, str], store: Store
) -> list[dict[str, Any]]:
    """One row per point: its values, and ``mean`` and ``std`` over seeds and members of the scores that differ.

    Args:
        points: of :meth:`Swept.record`.
        graph: of the run.
        artifacts: node -> digest.
        store: where their records are.
    """
    rows = []
    for point in points:
        scores: dict[str, dict[str, Any]] = {}
        for stage, name in point["stages"].items():
            if sum(other["stages"].get(stage) == name for other in points) == len(points):
                continue
            for score, values in _scores(graph.stages[name].nodes, artifacts, store).items():
                std = stdev(values) if len(values) > 1 else None
                scores[f"{stage}: {score}"] = {"mean": mean(values), "std": std, "count": len(values)}
        rows.append({"values": dict(point["values"]), "scores": scores})
    return rows


def _scores(nodes: Sequence[str], artifacts: Mapping[str, str], store: Store) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for node in nodes:
        if node not in artifacts:
            continue
        try:
            meta = store.artifact(artifacts[node]).meta
        except NotFoundError:
            continue
        scores = meta.get("scores")
        flat = {name: value for name, value in meta.items() if not isinstance(value, Mapping)}
        for name, value in numbers(scores if isinstance(scores, Mapping) else flat):
            found.setdefault(name, []).append(value)
    return found


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as text: the scores of the last stages first, at most six of them."""
    paths = list(rows[0]["values"]) if rows else []
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    order = {stage: i for i, stage in enumerate(dict.fromkeys(name.partition(": ")[0] for name in names))}
    names.sort(key=lambda name: -order[name.partition(": ")[0]])
    shown = names[:_COLUMNS]
    head = [*(path.rpartition(".")[2] for path in paths), *shown]
    lines = [
        [str(row["values"][path]) for path in paths] + [_cell(row["scores"].get(n)) for n in shown] for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *lines]]
    hidden = len(names) - len(shown)
    return [*text, *([f"(and {hidden} more scores: moepipe show, or submit --json)"] if hidden else [])]


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.4g}" + (f" ± {score['std']:.2g}" if score["std"] is not None else "")
