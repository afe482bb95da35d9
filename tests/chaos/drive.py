"""The command line with two openings for the campaign: Ray kills an actor, or loses an object, from within the driver.

An order is a file (``MOEPIPE_TEST_ORDERS``) with one word: ``actor``, ``sink`` or ``object``. It is carried out at the
executor's next look and answered by a line of JSON in ``<orders>.done``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from orchestrator.cli import main
from orchestrator.executors import ray as ray_module
from tests.chaos.stages import register

ORDERS = "MOEPIPE_TEST_ORDERS"


class _Keeper:
    """An actor that owns an object."""

    def put(self) -> list[Any]:
        """A reference to something too large to travel with it."""
        import ray

        return [ray.put(bytes(1 << 20))]


class Struck(ray_module.RayExecutor):
    """An executor that carries out orders."""

    _lose = False

    def __init__(self, address: str | None = None) -> None:
        super().__init__(address, preload=())  # the fan-outs don't use torch; the ranks of the gang import it

    def poll(self, timeout: float, deliver: Any) -> None:
        """See the base class."""
        orders = Path(os.environ[ORDERS])
        running = sorted(node for node, job in self._jobs.items() if job.seen)
        if running and orders.exists():
            word = orders.read_text()
            orders.unlink()
            self._strike(word, random.Random(f"{word}{len(running)}").choice(running))
        super().poll(timeout, deliver)

    def _strike(self, word: str, node: str) -> None:
        import ray

        if word == "object":
            self._lose = True
        elif word == "sink":
            ray.kill(self._sink, no_restart=False)
            self._tell(word, "")
        else:
            ray.kill(self._jobs[node].runner.actor)
            self._tell(word, node)

    def _collect(self, job: Any) -> Any:
        if self._lose:
            import ray

            self._lose = False
            # Ray has no call that loses an object: this one's owner died, so nobody will ever find it.
            keeper = ray.remote(num_cpus=0)(_Keeper).remote()
            (lost,) = ray.get(keeper.put.remote())
            ray.kill(keeper)
            time.sleep(0.5)
            job = dataclasses.replace(job, ref=lost)
            self._tell("object", job.task.node)
        return super()._collect(job)

    def _tell(self, word: str, node: str) -> None:
        with Path(os.environ[ORDERS] + ".done").open("a") as done:
            done.write(json.dumps({"time": time.time(), "what": word, "node": node}) + "\n")


if __name__ == "__main__":
    register()
    ray_module.RayExecutor = Struck  # type: ignore[misc]
    main()
