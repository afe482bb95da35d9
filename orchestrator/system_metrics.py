"""What a member's process uses while it works: processor, memory, GPUs, sampled every few seconds into the run record.

MLflow's own sampler writes from the process that trains; here only the projection writes to MLflow, so the samples
travel as metrics under MLflow's names (``system/...``) and appear on its page for system metrics. Short members give no
sample.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any

INTERVAL_S = 10.0
VARIABLE = "MOEPIPE_SYSTEM_METRICS"
_MB = 1e6


class SystemMetrics:
    """Samples in a thread while the block runs.

    Args:
        samples: receives (values, number of the sample) in the thread; whoever reports takes them out.
        interval: seconds between samples.
    """

    def __init__(self, samples: deque[tuple[dict[str, float], int]], interval: float = INTERVAL_S) -> None:
        self._samples, self._interval = samples, interval
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SystemMetrics:
        if os.environ.get(VARIABLE, "1") not in ("0", "false"):
            self._thread = threading.Thread(target=self._run, name="moepipe-system-metrics", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        try:
            psutil: Any = importlib.import_module("psutil")
        except ImportError:
            return
        process = psutil.Process()
        process.cpu_percent()
        number = 0
        while not self._done.wait(self._interval):
            values = sample(psutil, process)
            if self._done.is_set():
                return
            self._samples.append((values, number))
            number += 1


def sample(psutil: Any, process: Any) -> dict[str, float]:
    """One sample: percentages, and megabytes of 10^6 bytes."""
    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": float(psutil.cpu_percent()),
        "system/process_cpu_percentage": float(process.cpu_percent()),
        "system/process_memory_megabytes": process.memory_info().rss / _MB,
        "system/system_memory_usage_percentage": float(memory.percent),
    }
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(Exception):  # drivers without NVML have no utilisation
            for number in range(torch.cuda.device_count()):
                values[f"system/gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization(number))
                values[f"system/gpu_{number}_memory_usage_megabytes"] = torch.cuda.memory_allocated(number) / _MB
    return values
