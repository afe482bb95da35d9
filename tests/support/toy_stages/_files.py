"""Reading and writing the one file that a toy artifact has."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from workers.context import Input

Crash = Literal["error", "memory", "exit", "sigkill", "freeze"]


def write_value(folder: Path, value: int) -> dict[str, Any]:
    """Write ``value.json`` into ``folder`` and return the artifact's meta."""
    (folder / "value.json").write_text(json.dumps({"value": value}))
    return {"value": value}


def read_values(inputs: Sequence[Input]) -> list[int]:
    """The numbers of some artifacts, in their order, read from the files."""
    return [int(json.loads((item.path / "value.json").read_text())["value"]) for item in inputs]


def save(path: Path, value: dict[str, Any]) -> None:
    """Atomically write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def attempts(scratch: Path) -> int:
    """How many times this was called for ``scratch`` before now (counted on disk, survives a crash)."""
    path = scratch / "attempts.json"
    before = int(json.loads(path.read_text())["count"]) if path.exists() else 0
    save(path, {"count": before + 1})
    return before


def crash(how: Crash, message: str) -> None:
    """Fail in the way asked for; ``exit`` and ``sigkill`` end the process, ``freeze`` leaves it standing still."""
    if how == "memory":
        raise MemoryError(message)
    if how == "exit":
        os._exit(17)
    if how == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise RuntimeError(message)
