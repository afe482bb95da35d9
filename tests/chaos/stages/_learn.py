"""A small real training without torch, so that a new process works again at once: a network learns a random teacher.

Softmax regression behind one hidden layer, gradients by hand, momentum, batches that follow from (seed, step) alone; a
checkpoint is a file that carries its own digest, the last two are kept, a damaged one is passed over.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
from pydantic import Field

from orchestrator.stages.base import StageConfig
from tests.chaos.stages._count import note
from workers.context import Reporter

INPUTS, HIDDEN, CLASSES, _BATCH = 32, 64, 8, 32
SIZES = (INPUTS * HIDDEN, HIDDEN, HIDDEN * CLASSES, CLASSES)


class TrainConfig(StageConfig):
    """How long it trains."""

    steps: int = Field(240, ge=1, description="Updates.")
    pause_s: float = Field(0.02, ge=0, description="Idle seconds before each update: something to hit, on few cores.")
    checkpoint_every: int = Field(20, ge=1, description="Updates between checkpoints.")
    count: int = Field(1, ge=1, description="Members of the fan-out.")


def learn(
    config: TrainConfig, name: str, seed: int, start: np.ndarray | None, scratch: Path, reporter: Reporter
) -> np.ndarray:
    """Train (from ``start``, if any) and return all weights as one vector."""
    first = np.random.default_rng(seed)
    teacher_IC = first.standard_normal((INPUTS, CLASSES))
    weights = first.standard_normal(sum(SIZES)) * 0.1 if start is None else start.copy()
    velocity = np.zeros_like(weights)
    step, folder = 0, scratch / "checkpoints"
    if (found := _latest(folder, reporter)) is not None:
        step, weights, velocity = found
        reporter.log(f"Resumed at step {step} of {config.steps}.")
    while step < config.steps:
        note(f"{name}@{scratch.name[:8]}", step)
        time.sleep(config.pause_s)
        draw = np.random.default_rng((seed, step))
        x_BI = draw.standard_normal((_BATCH, INPUTS))
        loss, gradient = _gradient(weights, x_BI, (x_BI @ teacher_IC).argmax(1))
        velocity = 0.9 * velocity - 0.1 * gradient
        weights = weights + velocity
        step += 1
        reporter.progress(step, config.steps, loss=loss)
        if step % config.checkpoint_every == 0:
            _save(folder, step, weights, velocity)
            reporter.check()
    return weights


def _gradient(weights: np.ndarray, x_BI: np.ndarray, y_B: np.ndarray) -> tuple[float, np.ndarray]:
    """Cross-entropy and its gradient."""
    w1, b1, w2, b2 = np.split(weights, np.cumsum(SIZES)[:-1])
    w1_IH, w2_HC = w1.reshape(INPUTS, HIDDEN), w2.reshape(HIDDEN, CLASSES)
    h_BH = np.tanh(x_BI @ w1_IH + b1)
    scores_BC = h_BH @ w2_HC + b2
    scores_BC -= scores_BC.max(1, keepdims=True)
    p_BC = np.exp(scores_BC)
    p_BC /= p_BC.sum(1, keepdims=True)
    rows = np.arange(len(y_B))
    loss = float(-np.log(p_BC[rows, y_B]).mean())
    p_BC[rows, y_B] -= 1.0
    p_BC /= len(y_B)
    back_BH = (p_BC @ w2_HC.T) * (1.0 - h_BH**2)
    parts = (x_BI.T @ back_BH, back_BH.sum(0), h_BH.T @ p_BC, p_BC.sum(0))
    return loss, np.concatenate([part.ravel() for part in parts])


def _save(folder: Path, step: int, *vectors: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = np.concatenate(vectors).tobytes()
    aside = folder / f".writing-{os.getpid()}"
    aside.write_bytes(hashlib.sha256(data).digest() + data)
    os.replace(aside, folder / f"step-{step:08d}")
    for old in sorted(folder.glob("step-*"))[:-2]:
        old.unlink()


def _latest(folder: Path, reporter: Reporter) -> tuple[int, np.ndarray, np.ndarray] | None:
    for path in sorted(folder.glob("step-*"), reverse=True):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            weights, velocity = np.split(np.frombuffer(data[32:]), 2)
            return int(path.name[5:]), weights.copy(), velocity.copy()
        reporter.log(f"Skipped the damaged checkpoint {path.name}.")
    return None
