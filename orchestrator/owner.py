"""Who drives a run, whether that process still lives, and what it runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_SILENT_S = 60.0
_PACKAGES = ("moepipe", "torch", "ray", "deepspeed", "mlflow", "timm", "torchvision", "numpy")


def environment() -> dict[str, Any]:
    """What the results depended on besides the key: versions and the machine. No secrets, no variables."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "commit": commit(),
    }


def commit() -> str:
    """Git commit of the working directory; empty where there is none. Digests of the code stand in the keys."""
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        return found.stdout.strip()
    return ""


def process_start(pid: int) -> str:
    """A mark that tells a process from a later one with the same number (Linux; empty elsewhere)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def alive(owner: Mapping[str, Any], beat: float) -> bool:
    """Whether the process that wrote ``owner`` still drives the run."""
    if owner.get("host") != socket.gethostname():
        return time.time() - beat < _SILENT_S
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process_start(pid) == str(owner.get("start", ""))
