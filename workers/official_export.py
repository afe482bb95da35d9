"""Artifacts into Meta-DMoE's public checkpoints: exactly its file names, tensor names and shapes.

What its format cannot hold (an MoE block, another pooling) is refused instead of being lost silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.backbones import classifier_to_student, student_to_classifier
from moe.errors import CheckpointError, EnvironmentProblem, SpecError
from moe.keymaps.meta_dmoe import (
    OfficialFiles,
    backbone_of,
    backbone_shapes,
    check_official,
    official_files,
    official_name,
    selector_shapes,
)
from moe.specs import BackboneSpec
from workers.datasets.base import DATASETS
from workers.modelfile import AGGREGATOR_FILE, MODEL_FILE, load_tensors
from workers.official_checkpoints import official_aggregator, registry_name
from workers.official_split import split_bytes
from workers.sampling import DomainSplit

Write = Callable[[Path], None]


@dataclass(frozen=True)
class Source:
    """An artifact's folder with its record.

    Attributes:
        folder: its files.
        kind: kind of the artifact.
        meta: its JSON record.
    """

    folder: Path
    kind: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Sources:
    """What of a run is exported; anything may be left out.

    Attributes:
        split: the ``groups`` artifact.
        experts: the ``model`` artifacts of all experts, in their order.
        aggregator: the pre-trained aggregator.
        student: the pre-trained student, a ``model``.
        distill: the meta-trained student with its aggregator.
    """

    split: Source | None = None
    experts: Sequence[Source] = field(default_factory=tuple)
    aggregator: Source | None = None
    student: Source | None = None
    distill: Source | None = None


def export_run(
    sources: Sources, dataset: str, seed: int, out: Path, experts: int | None = None, force: bool = False
) -> list[Path]:
    """Write public files below ``out/model/{dataset}``; all of them or none.

    Args:
        sources: what to write.
        dataset: either name of the data set.
        seed: for the names.
        out: the folder that the public code is run in.
        experts: number of experts E for the names, when neither experts nor split say it.
        force: replace files that exist.

    Returns:
        The files, in the order of the pipeline.

    Raises:
        SpecError: nothing to export, E unknown or contradictory, or files that exist already.
        CheckpointError: an artifact of another kind, network or shape, or one that the format cannot hold.
        EnvironmentProblem: the files cannot be written.
    """
    ours, theirs = registry_name(dataset), official_name(dataset)
    files = official_files(ours, _count(sources, experts), seed)
    folder = out / "model" / theirs
    writers = dict(_writers(sources, ours, files))
    if not writers:
        raise SpecError("There is nothing to export.", "Name a split, expert, aggregator, student or distill.")
    there = [name for name in writers if (folder / name).exists()]
    if there and not force:
        raise SpecError(f"{folder} has {there[0]} already.", "Choose another folder, or pass --force to replace it.")
    aside = {folder / name: folder / f".{name}.{os.getpid()}" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, write in zip(aside.values(), writers.values(), strict=True):
            write(path)
        for path, written in aside.items():
            os.replace(written, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise EnvironmentProblem(f"Could not write into {folder}: {error}.", "Free some disk space.") from error
    finally:
        for written in aside.values():
            written.unlink(missing_ok=True)
    return list(aside)


def _count(sources: Sources, experts: int | None) -> int:
    """E, from whatever says it."""
    said = {
        "--experts": experts,
        "the experts given": len(sources.experts) or None,
        "the split": None if sources.split is None else len(_of_kind(sources.split, "groups").meta["groups"]),
    }
    numbers = {name: number for name, number in said.items() if number is not None}
    if not numbers:
        raise SpecError("The file names hold the number of experts, which nothing here says.", "Pass --experts.")
    if len(set(numbers.values())) > 1:
        told = ", ".join(f"{name}: {number}" for name, number in numbers.items())
        raise SpecError(f"The numbers of experts differ ({told}).", "Export parts that belong together.")
    return next(iter(numbers.values()))


def _writers(sources: Sources, dataset: str, files: OfficialFiles) -> Iterator[tuple[str, Write]]:
    """File name -> function that writes its content; artifacts are read when it is called, one at a time."""
    if sources.split is not None:
        yield files.split, _split_writer(_of_kind(sources.split, "groups"))
    for name, expert in zip(files.experts, sources.experts, strict=False):
        yield name, _saver(_network, _of_kind(expert, "model"), dataset, "expert")
    if sources.aggregator is not None:
        yield files.pretrained_selector, _saver(_selector, _of_kind(sources.aggregator, "aggregator"), dataset)
    if sources.student is not None:
        yield files.pretrained_student, _saver(_network, _of_kind(sources.student, "model"), dataset, "student")
    if sources.distill is not None:
        distill = _of_kind(sources.distill, "student")
        yield files.meta_selector, _saver(_selector, distill, dataset)
        yield files.meta_student, _saver(_network, distill, dataset, "student")


def _saver(make: Callable[..., dict[str, Tensor]], *arguments: Any) -> Write:
    return lambda path: torch.save(make(*arguments), path)


def _split_writer(source: Source) -> Write:
    groups = [list(group) for group in source.meta["groups"]]
    owner = {domain: expert for expert, group in enumerate(groups) for domain in group}
    return lambda path: _write_bytes(path, split_bytes(DomainSplit(groups, owner)))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _of_kind(source: Source, kind: str) -> Source:
    if source.kind != kind:
        raise CheckpointError(
            f"{source.folder} is an artifact of kind {source.kind!r} where a {kind!r} is needed.",
            "split: groups; expert and student: model; aggregator: aggregator; distill: student.",
        )
    return source


def _network(source: Source, dataset: str, part: str) -> dict[str, Tensor]:
    """The network of a ``model`` or ``student`` artifact in the public form of ``part``."""
    official, outputs = backbone_of(dataset), DATASETS.load(dataset).INFO.num_outputs
    backbone = BackboneSpec(**{**source.meta["backbone"], "pretrained": False})
    same = {**backbone.model_dump(exclude={"image_size"}), "last_relu": False}
    if same != official.model_dump(exclude={"image_size"}):
        seen = backbone.model_dump(exclude_defaults=True)
        raise CheckpointError(
            f"{source.folder} is a network {seen}; the public checkpoints of {dataset} are {official.name}.",
            "Only runs with the official backbone can be exported.",
        )
    if backbone.last_relu and part == "student":
        raise CheckpointError(
            f"{source.folder} was made with last_relu, which the public code leaves out: its features would be others.",
            "Keep the safetensors file.",
        )
    state, form = load_tensors(source.folder / MODEL_FILE), source.meta["form"]
    what = f"{source.folder / MODEL_FILE}"
    if part == "student" and form == "classifier":
        state = classifier_to_student(official, state)
    elif part == "expert" and form == "student":
        state = student_to_classifier(official, state)
    return _ordered(state, backbone_shapes(part, official, outputs), what)


def _selector(source: Source, dataset: str) -> dict[str, Tensor]:
    """The aggregator of an artifact; heads and pooling are not in the file, so they must be the public code's."""
    usual, given = official_aggregator(dataset), {"pool": "mean", "heads": 16, **source.meta["aggregator"]}
    for name in ("heads", "pool"):
        if given[name] != getattr(usual, name):
            raise CheckpointError(
                f"{source.folder} has an aggregator with {name}={given[name]}; the public code would read it with "
                f"{name}={getattr(usual, name)}.",
                "Keep the safetensors file.",
            )
    outputs = DATASETS.load(dataset).INFO.num_outputs
    ratio = float(given.get("mlp_ratio", usual.mlp_ratio))
    depth = int(given.get("depth", usual.depth))
    shapes = selector_shapes(int(given["dim"]), outputs, depth, usual.heads, ratio)
    path = source.folder / AGGREGATOR_FILE
    return _ordered(load_tensors(path), shapes, str(path))


def _ordered(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[str, Tensor]:
    """The checked tensors in the public order, each with memory of its own."""
    checked = check_official(state, dict(shapes), what)
    return {name: checked[name].contiguous().clone() for name in shapes}
