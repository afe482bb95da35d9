"""Training checkpoints: tensors in safetensors, counters in JSON, written aside and renamed, the last two kept.

A checkpoint is a folder ``step-00000042`` with ``state.safetensors`` (weights ``model/...``, moments
``optimizer/<parameter>/<slot>``, averages ``ema/...``) and ``state.json`` (counters and the digest of the tensors'
file). A folder that does not verify is skipped with a line in the log and the one before is used, so that a kill at any
moment loses at most one interval.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe.errors import CheckpointError, NotFoundError
from workers.engines.base import EngineState
from workers.modelfile import load_tensors, save_tensors

TENSORS = "state.safetensors"
COUNTERS = "state.json"
BEST = "best.safetensors"


@dataclass
class Checkpoint:
    """One resumable moment of a training loop.

    Attributes:
        step: updates done.
        engine: weights and moments by parameter name.
        ema: averaged weights by name; empty when off.
        counters: JSON values (best score, evaluations, early-stop count, ...).
    """

    step: int
    engine: EngineState
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)


class CheckpointDir:
    """The checkpoints of one training loop.

    Args:
        folder: where they live; made when missing. Only rank 0 writes.
        keep: how many of the newest stay.
        log: receives one line when a damaged checkpoint is skipped.
    """

    def __init__(self, folder: Path, keep: int = 2, log: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._log = log or (lambda message: None)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write atomically (temporary folder, then rename) and drop all but the newest ``keep``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{checkpoint.step:08d}"
        aside = self.folder / f".writing-{checkpoint.step:08d}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_tensors(aside / TENSORS, _flatten(checkpoint))
        record = {
            "step": checkpoint.step,
            "sha256": _digest(aside / TENSORS),
            "counters": checkpoint.counters,
        }
        (aside / COUNTERS).write_text(json.dumps(record, sort_keys=True))
        _sync(aside / COUNTERS)
        if final.exists():  # a damaged one of the same step, or the same step repeated after a resume
            shutil.rmtree(final)
        os.replace(aside, final)
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None when there is none."""
        readable = (self._read_or_log(folder) for folder in self._folders())
        return next((checkpoint for checkpoint in readable if checkpoint is not None), None)

    def _read_or_log(self, folder: Path) -> Checkpoint | None:
        try:
            return _read(folder)
        except (CheckpointError, NotFoundError, OSError, ValueError, KeyError) as error:
            self._log(f"Skipped the damaged checkpoint {folder.name}: {error}")
            return None

    def save_best(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights of the best evaluation so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.folder / BEST, tensors)

    def best(self) -> dict[str, torch.Tensor] | None:
        """Weights of the best evaluation, by name, or None when nothing was selected."""
        path = self.folder / BEST
        return load_tensors(path) if path.exists() else None

    def export(self, folder: Path) -> None:
        """Copy the newest checkpoint and the best weights into ``folder``, for another loop to :meth:`adopt`."""
        folder.mkdir(parents=True, exist_ok=True)
        newest = self._folders()[0]
        _read(newest)
        for path in (newest / TENSORS, newest / COUNTERS, self.folder / BEST):
            if path.exists():
                shutil.copyfile(path, folder / path.name)

    def adopt(self, folder: Path) -> None:
        """Begin with a state that another loop exported, unless there is a checkpoint to go on from.

        Raises:
            CheckpointError: the exported state is damaged.
        """
        if self.latest() is not None:
            return
        step = _read(folder).step
        self.folder.mkdir(parents=True, exist_ok=True)
        if (folder / BEST).exists():
            shutil.copyfile(folder / BEST, self.folder / BEST)
        final, aside = self.folder / f"step-{step:08d}", self.folder / f".adopting-{os.getpid()}"
        for old in (final, aside):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir()
        for name in (TENSORS, COUNTERS):
            shutil.copyfile(folder / name, aside / name)
        os.replace(aside, final)

    def clear(self) -> None:
        """Forget everything (the settings changed, or the artifact is committed)."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Complete checkpoint folders, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True) if self.folder.exists() else []


def _flatten(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": value for name, value in checkpoint.engine.module.items()}
    tensors |= {f"ema/{name}": value for name, value in checkpoint.ema.items()}
    for name, slots in checkpoint.engine.optimizer.items():
        tensors |= {f"optimizer/{name}/{slot}": value for slot, value in slots.items()}
    return tensors


def _read(folder: Path) -> Checkpoint:
    record = json.loads((folder / COUNTERS).read_text())
    if _digest(folder / TENSORS) != record["sha256"]:
        raise CheckpointError(f"{folder / TENSORS} does not match its digest.", "It was damaged after it was written.")
    state = EngineState(module={})
    checkpoint = Checkpoint(step=int(record["step"]), engine=state, counters=record["counters"])
    for key, value in load_tensors(folder / TENSORS).items():
        kind, _, name = key.partition("/")
        if kind == "model":
            state.module[name] = value
        elif kind == "ema":
            checkpoint.ema[name] = value
        else:
            parameter, _, slot = name.rpartition("/")
            state.optimizer.setdefault(parameter, {})[slot] = value
    return checkpoint


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_digest(file)
        )


def _slow_digest(file: Any) -> str:
    """Python 3.10 has no ``hashlib.file_digest``."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
