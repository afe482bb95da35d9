"""Meta-DMoE's public checkpoints (repository ``n3il666/Meta-DMoE``) into artifacts. The way back: ``official_export``.

Names and shapes are checked strictly (``moe.keymaps.meta_dmoe``), files are opened with ``weights_only``, and all of a
run is read before anything of it is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.algorithms.meta_dmoe import PRESETS, AggregatorSpec
from moe.backbones import feature_dim
from moe.errors import CheckpointError, NotFoundError
from moe.keymaps.meta_dmoe import (
    OFFICIAL_NAMES,
    OfficialFiles,
    backbone_of,
    backbone_shapes,
    check_official,
    official_files,
    official_name,
    selector_arguments,
    selector_shapes,
)
from workers.datasets.base import DATASETS
from workers.modelfile import AGGREGATOR_FILE, MODEL_FILE, Form, model_meta, save_tensors
from workers.official_split import read_split
from workers.weight_files import read_state

GROUPS_FILE = "groups.json"


@dataclass(frozen=True)
class OfficialRun:
    """A folder with public files of one run.

    Attributes:
        folder: where they lie (``.../model/camelyon``).
        dataset: registry name of the data set.
        experts: number of experts E.
        seed: seed in the names.
        files: the names of all files that such a run can have.
    """

    folder: Path
    dataset: str
    experts: int
    seed: int
    files: OfficialFiles

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.folder / name).is_file()


@dataclass(frozen=True)
class Part:
    """One artifact, still in a working folder.

    Attributes:
        name: ``split``, ``expert-0``, ..., ``aggregator``, ``student`` (pre-trained) or ``distill`` (meta-trained).
        kind: kind of the artifact.
        folder: its files.
        sources: public files that it was read from.
        meta: its JSON record.
    """

    name: str
    kind: str
    folder: Path
    sources: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


def registry_name(dataset: str) -> str:
    """Our name of a data set, given either name (SpecError when there are no public checkpoints of it)."""
    official = official_name(dataset)
    return next(name for name, theirs in OFFICIAL_NAMES.items() if theirs == official)


def official_aggregator(dataset: str) -> AggregatorSpec:
    """Depth, heads, width and pooling that the public code builds for a data set (our name)."""
    return AggregatorSpec(**PRESETS[dataset].get("aggregator", {}))


def find_run(folder: Path, dataset: str, experts: int | None = None, seed: int | None = None) -> OfficialRun:
    """The run whose files lie in ``folder`` or in its ``model/{dataset}``.

    Args:
        folder: what the user named.
        dataset: either name.
        experts: number of experts, when the folder holds several runs.
        seed: seed, when the folder holds several runs.

    Raises:
        SpecError: no public checkpoints for this data set.
        NotFoundError: no such folder, or no file of such a run in it.
        CheckpointError: several runs to choose from.
    """
    ours, theirs = registry_name(dataset), official_name(dataset)
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder}.", "Name the folder that holds model/, or the files.")
    inner = next((path for path in (folder / "model" / theirs, folder / theirs) if path.is_dir()), folder)
    pattern = re.compile(rf"{theirs}_(\d+)experts_seed(\d+)_.+_best\.pth")
    matches = {(int(m[1]), int(m[2])) for path in inner.iterdir() if (m := pattern.fullmatch(path.name))}
    chosen = sorted(m for m in matches if experts in (None, m[0]) and seed in (None, m[1]))
    if not chosen:
        also = ", ".join(f"{e} experts with seed {s}" for e, s in sorted(matches))
        raise NotFoundError(
            f"{inner} holds no file {theirs}_{'E' if experts is None else experts}experts_seed"
            f"{'S' if seed is None else seed}_..._best.pth.",
            f"It holds runs of {also}." if also else "Check the folder and --dataset.",
        )
    if len(chosen) > 1:
        runs = ", ".join(f"--experts {e} --seed {s}" for e, s in chosen)
        raise CheckpointError(f"{inner} holds files of {len(chosen)} runs of {theirs}.", f"Choose one: {runs}.")
    count, number = chosen[0]
    return OfficialRun(inner, ours, count, number, official_files(ours, count, number))


def import_run(run: OfficialRun, working: Callable[[], Path], keep_split: bool = False) -> list[Part]:
    """Read every file of a run that is there into working folders, in the order of the pipeline.

    Args:
        run: of :func:`find_run`.
        working: makes a new empty folder; the caller keeps or removes them.
        keep_split: take a split that the seed in the names does not give.

    Raises:
        CheckpointError: an expert or one half of the meta-trained pair is missing; a file is truncated, holds more than
            tensors, or has missing, unexpected or wrongly shaped tensors (named); a stale domain split.
    """
    _require_whole(run)
    return list(_parts(run, working, keep_split))


def _require_whole(run: OfficialRun) -> None:
    for what, names in {
        "experts": run.files.experts,
        "meta-trained student and aggregator": (run.files.meta_student, run.files.meta_selector),
    }.items():
        missing = [name for name in names if not run.has(name)]
        if missing and len(missing) < len(names):
            raise CheckpointError(
                f"{run.folder} has only {len(names) - len(missing)} of {len(names)} files of the {what}; "
                f"missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.",
                "Copy the rest; one is of no use without the others.",
            )


def _parts(run: OfficialRun, working: Callable[[], Path], keep_split: bool) -> Iterator[Part]:
    files, groups = run.files, None
    if run.has(files.split):
        folder = working()
        groups = read_split(run.folder / files.split, run.experts, None if keep_split else run.seed).groups
        (folder / GROUPS_FILE).write_text(json.dumps(groups))
        record = {"groups": groups, "sizes": [len(group) for group in groups], **_origin(run)}
        yield Part("split", "groups", folder, (files.split,), record)
    if run.has(files.experts[0]):
        for number, name in enumerate(files.experts):
            folder, meta = _network(run, name, "classifier", working())
            domains = {} if groups is None else {"domains": groups[number]}
            yield Part(f"expert-{number}", "model", folder, (name,), {**meta, **domains})
    if run.has(files.pretrained_selector):
        folder, meta = _aggregator(run, files.pretrained_selector, working())
        meta["experts"] = [f"group={number}" for number in range(run.experts)]
        meta["dataset"] = run.dataset
        yield Part("aggregator", "aggregator", folder, (files.pretrained_selector,), {**meta, **_origin(run)})
    if run.has(files.pretrained_student):
        folder, meta = _network(run, files.pretrained_student, "student", working())
        yield Part("student", "model", folder, (files.pretrained_student,), meta)
    if run.has(files.meta_student):
        folder, meta = _network(run, files.meta_student, "student", working())
        _, selector = _aggregator(run, files.meta_selector, folder)
        adaptation = {"adaptation": _adaptation(run.dataset)}
        sources = (files.meta_student, files.meta_selector)
        yield Part("distill", "student", folder, sources, {**meta, **selector, **adaptation})


def _network(run: OfficialRun, name: str, form: Form, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Check a public network and write it into ``folder``; returns it with the record."""
    backbone, outputs = backbone_of(run.dataset), DATASETS.load(run.dataset).INFO.num_outputs
    part = "expert" if form == "classifier" else "student"
    state = _read(run.folder / name, backbone_shapes(part, backbone, outputs))
    save_tensors(folder / MODEL_FILE, state)
    meta = model_meta(form, backbone, outputs, feature_dim(backbone), run.dataset)
    return folder, {**meta, "image_size": None, **_origin(run)}


def _aggregator(run: OfficialRun, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Check a public aggregator and write it into ``folder``; depth and width come from the file."""
    usual, outputs = official_aggregator(run.dataset), DATASETS.load(run.dataset).INFO.num_outputs
    path = run.folder / name
    state = read_state(path)
    try:
        arguments = selector_arguments(state, usual.heads)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", error.hint) from None
    depth, ratio = int(arguments["depth"]), float(arguments["mlp_ratio"])
    shapes = selector_shapes(feature_dim(backbone_of(run.dataset)), outputs, depth, usual.heads, ratio)
    save_tensors(folder / AGGREGATOR_FILE, check_official(state, shapes, str(path)))
    return folder, {"aggregator": {**arguments, "dropout": usual.dropout, "pool": usual.pool}}


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return check_official(read_state(path), shapes, str(path))


def _adaptation(dataset: str) -> dict[str, Any]:
    """How the public code adapts the meta-trained student; a state dict does not say it."""
    meta = PRESETS[dataset]["meta"]
    return {"inner_lr": meta["step"]["inner_lr"], "inner_steps": 1, "adapt": "all", "support": meta["support"]}


def _origin(run: OfficialRun) -> dict[str, Any]:
    return {"official": {"experts": run.experts, "seed": run.seed}}
