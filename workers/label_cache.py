"""Labels of splits on disk: kept under a digest of the weights, and read from the public code's files.

Clustering takes seconds a layer; labels depend on the keys, E, the method and the seed only, so every learning rate,
seed and K of a search shares them. Source of the official formats: public code of EMoE (arXiv 2310.10908).
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.conversion.split import SplitMethod, check_labels, split_digest, split_keys
from moe.errors import CheckpointError, NotFoundError


def read_labels(path: Path, neurons: int, num_experts: int) -> Tensor:
    """Labels int64 ``[F]`` of a ``.npy`` (BERT, GPT-2, ViT, DeiT) or ``.pth`` file (LLaMA) of the public code.

    Nothing in the file is executed.

    Args:
        path: the file; its name says layer and shape, see ``moe.keymaps.emoe.cluster_file``.
        neurons: F.
        num_experts: E.

    Raises:
        NotFoundError: no such file.
        CheckpointError: damaged, or needs code to open.
        SpecError: the labels are not an equal split of F neurons into E experts.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no file of labels {path}.", "Check the layer, the experts and the shape.")
    try:
        if path.suffix == ".npy":
            labels = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            labels = torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a file of labels ({type(error).__name__}: {error}).") from error
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise CheckpointError(f"{path} does not hold integer labels.", "Expected one integer per neuron.")
    labels = labels.long()
    check_labels(labels, neurons, num_experts)
    return labels


def cached_labels(
    folder: Path, keys_FD: Tensor, num_experts: int, method: SplitMethod = "balanced", seed: int = 0, restarts: int = 10
) -> Tensor:
    """:func:`moe.conversion.split.split_keys`, kept in ``folder`` under a digest of all that decides it.

    Safe with several processes: a file appears complete or not at all. A damaged one is made again.
    """
    path = folder / f"{split_digest(keys_FD, num_experts, method, seed, restarts)}.npy"
    try:
        return read_labels(path, keys_FD.shape[0], num_experts)
    except (NotFoundError, CheckpointError):
        labels = split_keys(keys_FD, num_experts, method, seed=seed, restarts=restarts)
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.npy")
    np.save(aside, labels.numpy().astype(np.int32))
    aside.replace(path)
    return labels
