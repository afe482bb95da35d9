"""Processes that find each other by torch's environment variables, and what they say when one of them fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]


def pair_environments() -> list[dict[str, str]]:
    """Environment variables of the two ranks of a pair, on a free port."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


def run_together(
    module: str, argument: Path, environments: Sequence[Mapping[str, str]], timeout: float, **more: str
) -> None:
    """Run ``python -m module argument`` once per environment, all at once; every one must succeed.

    Args:
        module: below the root of the repository.
        argument: its only argument.
        environments: variables of each process; a process without them is alone.
        timeout: seconds.
        more: variables of all of them.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    inherited |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-m", module, str(argument)]
    running = [
        subprocess.Popen(
            command, env={**inherited, **own}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for own in environments
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
