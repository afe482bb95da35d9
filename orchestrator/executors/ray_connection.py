"""The Ray that members run on: embedded in this process, found in it, or a cluster's. Ray is imported when it opens."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from signal import SIGTERM, getsignal
from signal import signal as set_handler
from typing import Any

from moe.errors import EnvironmentProblem
from orchestrator.capacity import Amounts, machine_capacity
from orchestrator.executors.ray_env import prepare_environment, remove_dead_sessions

OBJECT_STORE_BYTES = 256 * 2**20
_HIDDEN = ("node:", "object_store_memory", "accelerator_type:")


class Connection:
    """One Ray, which can be opened again after it closed or died.

    Args:
        address: None: an embedded Ray, or the one that this process is connected to already. Otherwise ``auto``,
            ``host:port`` or ``ray://host:port``.
        num_cpus: cores of the embedded Ray; default all that this process may use.

    Attributes:
        cores: of the embedded Ray, 0 before it started.
        processes: Ray's own processes of the embedded Ray, empty without one: the raylet, then the control store.
    """

    def __init__(self, address: str | None, num_cpus: float | None) -> None:
        self.address = address
        self.cores = 0
        self.processes: list[Any] = []
        self._num_cpus = num_cpus
        self._owned = False

    def open(self) -> None:
        """Start the embedded Ray or join the cluster; nothing if this process has a Ray.

        Raises:
            EnvironmentProblem: it does not start, or nobody answers at the address.
        """
        folder = prepare_environment()
        import ray

        if ray.is_initialized():
            return
        asked = getsignal(SIGTERM)
        try:
            if self.address is None:
                remove_dead_sessions(folder)
                self._start_embedded(folder)
            else:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises a bare Exception when a process of its own dies while it starts
            what = "An embedded Ray could not be started" if self.address is None else f"No Ray at {self.address}"
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise EnvironmentProblem(f"{what}: {said}.", "Try `moepipe resume`; `moepipe doctor` checks it.") from None
        self._owned = True
        # Ray puts a handler of its own there, which ends the driver at once; ours lets members reach a checkpoint.
        if callable(asked) and threading.current_thread() is threading.main_thread():
            set_handler(SIGTERM, asked)

    def _start_embedded(self, folder: Path) -> None:
        import ray

        capacity = machine_capacity(self._num_cpus).machines[0]
        self.cores = int(capacity["cpus"]) or 1
        ray.init(
            address="local",
            num_cpus=self.cores,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=OBJECT_STORE_BYTES,
            _memory=int(capacity["memory_gb"] * 1e9),
            _temp_dir=str(folder),
        )
        node = ray._private.worker._global_node
        for kind in ("raylet", "gcs_server"):
            self.processes += [info.process for info in node.all_processes.get(kind, [])]

    @property
    def embedded(self) -> bool:
        """Whether the Ray in use was started here."""
        return bool(self.processes)

    def dead(self) -> bool:
        """Whether the embedded Ray's own processes are gone. Ray itself notices only after some 15 s."""
        return any(process.poll() is not None for process in self.processes)

    def forget(self) -> None:
        """Leave a Ray that died."""
        import ray

        self.processes = []
        ray.shutdown()

    def close(self) -> None:
        """Leave the cluster, or end the embedded Ray; a Ray that was there before stays."""
        import ray

        self.processes = []
        if self._owned:
            ray.shutdown()
            self._owned = False


def connected() -> bool:
    """Whether this process has joined a Ray; without importing it."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def amounts_of(resources: Mapping[str, float]) -> Amounts:
    """A node's resources by Ray's names -> by ours; without those that Ray makes for itself."""
    names = {"CPU": "cpus", "GPU": "gpus"}
    amounts: Amounts = {"cpus": 0.0, "gpus": 0.0}
    for name, amount in resources.items():
        if name == "memory":
            amounts["memory_gb"] = amount / 1e9
        elif not name.startswith(_HIDDEN):
            amounts[names.get(name, name)] = float(amount)
    return amounts
