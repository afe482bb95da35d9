"""Device, threads and determinism, decided once per process.

Every training function calls :func:`setup` first; nothing else in ``workers`` touches global torch switches.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

import torch

from moe.errors import EnvironmentProblem


@dataclass(frozen=True)
class DeviceChoice:
    """What :func:`setup` decided.

    Attributes:
        device: where tensors and modules go.
        threads: compute threads of this process.
    """

    device: torch.device
    threads: int


def setup(threads: int = 1, device: str = "auto", local_rank: int = 0) -> DeviceChoice:
    """Fix device, number of threads and determinism for this process.

    Args:
        threads: compute threads, >= 1. The order of float additions depends on it, so it is part of cache keys.
        device: ``auto`` (CUDA when there is one, else CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        local_rank: which GPU a rank of a gang takes under ``auto`` and ``cuda``.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not there.
    """
    name = device
    if device in ("auto", "cuda"):
        if torch.cuda.is_available():
            name = f"cuda:{local_rank % torch.cuda.device_count()}"
        elif device == "auto":
            name = "cpu"
    chosen = torch.device(name)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(f"The device {device!r} was asked for, but no GPU is visible.", "Use 'auto' or 'cpu'.")
    keep_memory()
    torch.set_num_threads(max(1, threads))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # TensorFloat-32 rounds the inputs of matrix products to 10 bits; fp32 must mean fp32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return DeviceChoice(device=chosen, threads=max(1, threads))


@cache
def keep_memory() -> None:
    """Let glibc keep freed memory instead of handing it back to the system; elsewhere nothing happens.

    A training step frees and takes the same large blocks again and again. By default each is a mapping of its own, and
    the system clears its pages one by one every time: up to half of a step. The peak stays what it was.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
