"""Checkpoints of expert models: one file per expert, one for everything else, and a manifest with digests.

An expert is the unit on disk, so that a model that was saved by R ranks loads on any other number of ranks, and a rank
reads its own experts only. Files carry the digest of their content in their names and the manifest is replaced last: a
save that is interrupted leaves the old checkpoint whole. After every save the files are read back, and after every load
the content is compared with the manifest expert by expert: a checkpoint whose experts were mixed up never loads.

Inside a file, tensors are named as ``moe.layers.executors`` names one expert (``w1.weight``, ``w1.bias``, ...). A
layer's state may be *stacked* (``<prefix>w1`` ``[E, H, D]``) or *numbered* (``<prefix><e>.w1.weight``); either loads as
either.

Nothing in a file is executed: safetensors and JSON only.

Shapes: E experts, H hidden, D width, R ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from moe.errors import CheckpointError, EnvironmentProblem, NotFoundError, SpecError
from moe.layers.experts import STACKED_NAMES, numbered_state
from workers.modelfile import load_tensors, save_tensors

Form = Literal["stacked", "numbered"]
MANIFEST = "manifest.json"


class FileRecord(BaseModel):
    """One file: its place, what it holds and the digest of that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="Name below the checkpoint's folder.")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 over names, types, shapes and values.")
    shapes: dict[str, list[int]] = Field(description="Shape of each tensor.")

    @field_validator("file")
    @classmethod
    def _inside(cls, file: str) -> str:
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise ValueError(f"{file!r} is not a plain file name")
        return file


class LayerManifest(BaseModel):
    """The experts of one layer in order, each with a file of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Form = Field(description="How the layer's state was named when it was saved.")
    experts: list[FileRecord] = Field(min_length=1, description="Expert 0 to E - 1.")


class Manifest(BaseModel):
    """What ``manifest.json`` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["moepipe-experts/1"] = Field(description="Version of the layout.")
    shared: FileRecord = Field(description="Everything that is no expert.")
    layers: dict[str, LayerManifest] = Field(description="Layers by the prefix of their experts' names.")


class Share(BaseModel):
    """What one rank wrote: handed to :func:`commit`, plain enough to travel as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shared: FileRecord | None = Field(description="Written by rank 0 only.")
    forms: dict[str, Form] = Field(description="Form of each layer by prefix.")
    counts: dict[str, int] = Field(description="Experts of each layer over all ranks by prefix.")
    experts: dict[str, dict[int, FileRecord]] = Field(description="Files by layer prefix and global expert number.")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return total.hexdigest()


def save_experts(folder: Path, state: Mapping[str, Tensor], layers: Mapping[str, int]) -> Manifest:
    """Save a whole model.

    Args:
        folder: made when missing; an older checkpoint in it is replaced at the end, in one step.
        state: all tensors, experts stacked or numbered.
        layers: number of experts E by prefix of their names, for example ``{"blocks.8.mlp.experts.": 6}``.

    Raises:
        CheckpointError: an expert lacks a tensor that others have; a file reads back otherwise than written.
        EnvironmentProblem: the disk is full or the folder cannot be written.
    """
    return commit(folder, [save_share(folder, state, layers)])


def save_share(
    folder: Path, state: Mapping[str, Tensor], layers: Mapping[str, int], rank: int = 0, world_size: int = 1
) -> Share:
    """Write one rank's experts; rank 0 writes the shared tensors as well. Then one rank calls :func:`commit`.

    Args:
        folder: the same for all ranks.
        state: with world size 1 everything; else this rank's share, stacked ``[E / R, ...]`` or numbered globally.
        layers: number of experts E over all ranks by prefix.
        rank: this rank.
        world_size: ranks R that share the experts; divides E.

    Raises:
        SpecError: E is not a multiple of R.
        CheckpointError: an expert lacks a tensor; a file reads back otherwise than written.
        EnvironmentProblem: the disk is full or the folder cannot be written.
    """
    rest, forms = dict(state), {}
    experts: dict[str, dict[int, FileRecord]] = {}
    for prefix, count in layers.items():
        numbers = _numbers(prefix, count, rank, world_size)
        forms[prefix], parts = _take(rest, prefix, numbers)
        experts[prefix] = {
            e: _write(folder, f"{_plain(prefix)}-{e:05d}", part) for e, part in zip(numbers, parts, strict=True)
        }
    shared = _write(folder, "shared", rest) if rank == 0 else None
    return Share(shared=shared, forms=forms, counts=dict(layers), experts=experts)


def commit(folder: Path, shares: Iterable[Share]) -> Manifest:
    """Make what the ranks wrote the checkpoint of ``folder``, and remove the files of an older one.

    Raises:
        CheckpointError: an expert was written by nobody or twice, or the shared tensors are missing.
        EnvironmentProblem: the folder cannot be written.
    """
    parts = list(shares)
    shared = next((part.shared for part in parts if part.shared is not None), None)
    if shared is None:
        raise CheckpointError("Nobody wrote the shared tensors.", "Rank 0 must call save_share too.")
    layers: dict[str, LayerManifest] = {}
    for prefix in parts[0].forms:
        found: dict[int, FileRecord] = {}
        for part in parts:
            for e, record in part.experts.get(prefix, {}).items():
                if e in found:
                    raise CheckpointError(f"Expert {e} of {prefix!r} was written twice.", "Give each rank its share.")
                found[e] = record
        missing = sorted(set(range(parts[0].counts[prefix])) - set(found))
        if missing:
            raise CheckpointError(f"Expert {missing[0]} of {prefix!r} was written by nobody.", "A rank is missing.")
        layers[prefix] = LayerManifest(form=parts[0].forms[prefix], experts=[found[e] for e in sorted(found)])
    manifest = Manifest(format="moepipe-experts/1", shared=shared, layers=layers)
    aside = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        aside.write_text(json.dumps(manifest.model_dump(), indent=1, sort_keys=True))
        os.replace(aside, folder / MANIFEST)
    except OSError as error:
        raise EnvironmentProblem(f"Could not write {folder / MANIFEST}: {error}.", "Free some disk space.") from error
    finally:
        aside.unlink(missing_ok=True)
    wanted = {record.file for record in _records(manifest)}
    for old in folder.glob("*.safetensors"):
        if old.name not in wanted:
            old.unlink()
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        NotFoundError: there is none: no checkpoint, or a save that was interrupted before its end.
        CheckpointError: damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"There is no {path}.", "The folder holds no finished checkpoint of experts.")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is damaged at {place!r}: {first['msg']}.", "Save the checkpoint again."
        ) from error


def load_experts(folder: Path, rank: int = 0, world_size: int = 1, form: Form | None = None) -> dict[str, Tensor]:
    """Shared tensors and this rank's experts.

    Args:
        folder: of a checkpoint, saved by any number of ranks.
        rank: this rank.
        world_size: ranks R that share the experts now; divides every layer's E. 1 loads everything.
        form: ``stacked`` (``[E / R, ...]``) or ``numbered`` (by global number); as saved when left out.

    Raises:
        NotFoundError: no manifest.
        SpecError: a layer's E is not a multiple of R.
        CheckpointError: a file is missing, truncated, exchanged or altered (layer, expert and tensor are named).
    """
    manifest = read_manifest(folder)
    state = _read(folder, manifest.shared, "the shared tensors")
    for prefix, layer in manifest.layers.items():
        numbers = _numbers(prefix, len(layer.experts), rank, world_size)
        parts = [_read(folder, layer.experts[e], f"expert {e} of {prefix!r}") for e in numbers]
        if (form or layer.form) == "numbered":
            state |= {f"{prefix}{e}.{n}": v for e, part in zip(numbers, parts, strict=True) for n, v in part.items()}
        else:
            state |= {f"{prefix}{short}": torch.stack([part[long] for part in parts])
                      for short, long in STACKED_NAMES.items() if long in parts[0]}  # fmt: skip
    return state


def load_into(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """``module.load_state_dict`` that explains what does not fit.

    Raises:
        CheckpointError: a tensor is missing, extra, transposed or of another shape; it and both shapes are named.
    """
    expected = {name: list(value.shape) for name, value in module.state_dict().items()}
    for name, shape in expected.items():
        if name not in state:
            raise CheckpointError(f"{what}: tensor {name!r} {shape} is missing.", "Is it of another model?")
        found = list(state[name].shape)
        if found == shape:
            continue
        turned = found == [*shape[:-2], *shape[:-3:-1]] and len(shape) > 1
        hint = "It is transposed: the layer stores (out, in)." if turned else "Other sizes than the model's."
        raise CheckpointError(f"{what}: tensor {name!r} is {found}, expected {shape}.", hint)
    extra = [name for name in state if name not in expected]
    if extra:
        raise CheckpointError(
            f"{what}: tensor {extra[0]!r} {list(state[extra[0]].shape)} is not part of the model ({len(extra)} such).",
            "Is it of another model?",
        )
    module.load_state_dict(dict(state))


def _numbers(prefix: str, count: int, rank: int, world_size: int) -> range:
    if world_size < 1 or not 0 <= rank < world_size or count % world_size:
        raise SpecError(
            f"The {count} experts of {prefix!r} cannot be shared by {world_size} ranks (rank {rank}).",
            "The number of experts must be a multiple of the number of ranks.",
        )
    return range(rank * (count // world_size), (rank + 1) * (count // world_size))


def _take(rest: dict[str, Tensor], prefix: str, numbers: range) -> tuple[Form, list[dict[str, Tensor]]]:
    """Remove one layer's experts from ``rest``; returns their form and each expert's tensors under its own names."""
    mine = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
    stacked = any(name in STACKED_NAMES for name in mine)
    if stacked:
        for name, value in mine.items():
            if name not in STACKED_NAMES or not value.ndim or value.shape[0] != len(numbers):
                raise CheckpointError(
                    f"Tensor {prefix + name!r} is {list(value.shape)}.", f"Expected {len(numbers)} stacked experts."
                )
        mine = {f"{numbers[int(name.split('.')[0])]}.{name.partition('.')[2]}": value
                for name, value in numbered_state(mine).items()}  # fmt: skip
    parts = [{n.partition(".")[2]: v for n, v in mine.items() if n.partition(".")[0] == str(e)} for e in numbers]
    every = sorted({name for part in parts for name in part})
    for e, part in zip(numbers, parts, strict=True):
        missing = [name for name in every if name not in part]
        if missing or not part:
            raise CheckpointError(
                f"Tensor {f'{prefix}{e}.' + (missing[0] if missing else 'w1.weight')!r} is missing.",
                "Every expert of a layer has the same tensors.",
            )
    if sum(len(part) for part in parts) != len(mine):
        known = {f"{e}.{name}" for e, part in zip(numbers, parts, strict=True) for name in part}
        odd = next(name for name in mine if name not in known)
        raise CheckpointError(
            f"Tensor {prefix + odd!r} belongs to no expert {numbers.start} to {numbers.stop - 1}.",
            "Is the number of experts right?",
        )
    return ("stacked" if stacked else "numbered"), parts


def _write(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write, read back, compare."""
    seal = digest(tensors)
    name = f"{stem}-{seal[:12]}.safetensors"
    save_tensors(folder / name, tensors)
    if (found := digest(load_tensors(folder / name))) != seal:
        raise CheckpointError(
            f"{folder / name} reads back with digest {found[:12]} instead of {seal[:12]}.", "The disk may be failing."
        )
    return FileRecord(file=name, digest=seal, shapes={n: list(v.shape) for n, v in sorted(tensors.items())})


def _read(folder: Path, record: FileRecord, what: str) -> dict[str, Tensor]:
    path = folder / record.file
    if not path.is_file():
        raise CheckpointError(f"{path} with {what} is missing.", "Copy the whole folder, or save again.")
    tensors = load_tensors(path)
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    for name in sorted(set(shapes) | set(record.shapes)):
        if shapes.get(name) != record.shapes.get(name):
            raise CheckpointError(
                f"{path}: in {what}, tensor {name!r} is {shapes.get(name, 'missing')}, "
                f"the manifest says {record.shapes.get(name, 'nothing')}.",
                "The file is not the one that was saved.",
            )
    if (found := digest(tensors)) != record.digest:
        raise CheckpointError(
            f"{path}: {what} has digest {found[:12]}, the manifest says {record.digest[:12]}.",
            "The file was altered or exchanged for another expert's.",
        )
    return tensors


def _records(manifest: Manifest) -> list[FileRecord]:
    return [manifest.shared, *(record for layer in manifest.layers.values() for record in layer.experts)]


def _plain(prefix: str) -> str:
    """A prefix as a part of a file name."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in prefix).strip(".") or "experts"
