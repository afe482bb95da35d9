"""Is this machine fit to run pipelines? Each check says what it saw and, when it is not well, what to do.

Nothing heavy is imported into this process: versions come from the installed metadata, torch is tried in a child.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

DISTRIBUTION = "moepipe"
OUR_PACKAGES = ("moe", "workers", "orchestrator", "serve")
TESTED_SET = "pip install -c constraints.txt -e '.[demo,search,text,graph,dev]'"
LIBRARIES = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "timm", "wilds", "pydantic", "typer")
PORTS = {8265: "Ray dashboard", 5000: "MLflow (moepipe ui)"}

_DISK_NEEDED = 1e9
_DISK_ADVISED = 10e9
_SHM_ADVISED = 1e9
_PROBE_SECONDS = 9.0
_TORCH_PROBE = (
    "import json, torch; n = torch.cuda.device_count(); "
    "from moe.layers.kernel_choice import describe_choice; "
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda,"
    " 'gpus': [torch.cuda.get_device_name(i) for i in range(n)],"
    " 'kernels': describe_choice('cuda' if n else 'cpu')}))"
)

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        status: ``failed`` stops pipelines from running here, ``warning`` does not.
        detail: what was seen.
        fix: what to do, a command where there is one; empty when ``ok``.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def examine(store: str, data_root: Path, tracking_uri: str) -> list[Check]:
    """Run every check.

    Args:
        store: store folder or fsspec URL.
        data_root: folder with prepared data sets.
        tracking_uri: where MLflow writes.
    """
    probe = subprocess.Popen(
        [sys.executable, "-c", _TORCH_PROBE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        groups: list[Callable[[], Iterator[Check]]] = [
            _python,
            _our_packages,
            _libraries,
            lambda: _store(store),
            _shared_memory,
            lambda: _tracking(tracking_uri),
            _ports,
            _ray_token,
            lambda: _data(data_root),
        ]
        checks = [check for group in groups for check in group()]
        return [*checks, *_torch(probe)]
    finally:
        if probe.poll() is None:
            probe.kill()
        probe.communicate()


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    fix = (
        ""
        if good
        else "Make the environment with Python 3.11: make clean; rm -rf .venv; make PYTHON=python3.11 install"
    )
    yield Check("Python", "ok" if good else "failed", f"{version} ({sys.executable})", fix)


def _our_packages() -> Iterator[Check]:
    """Top-level names like ``serve`` are common: make sure that ours win, all from one place."""
    home = Path(__file__).resolve().parent.parent
    strangers = []
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if places != [home / name]:
            strangers.append(f"{name} is {places[0] if places else 'missing'}")
    if strangers:
        fix = f"Uninstall the package that owns it, or put {home} first on PYTHONPATH."
        yield Check("moepipe's packages", "failed", "; ".join(strangers), fix)
    else:
        yield Check("moepipe's packages", "ok", f"{', '.join(OUR_PACKAGES)} from {home}")


def versions() -> dict[str, str | None]:
    """Installed versions of the libraries that matter; None when one is missing."""
    return {name: _version(name) for name in (DISTRIBUTION, *LIBRARIES)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ranges() -> Mapping[str, str]:
    """Version ranges that moepipe declares, by library."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {item.name.lower(): str(item.specifier) for item in requirements if item.marker is None}


def _libraries() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    found, ranges = versions(), _ranges()
    if found[DISTRIBUTION] is None:
        yield Check(
            "moepipe",
            "failed",
            "not installed as a distribution",
            TESTED_SET,
        )
    for name in LIBRARIES:
        version, wanted = found[name], ranges.get(name, "")
        fix = f"pip install '{name}{wanted}' (or the tested set: {TESTED_SET})"
        if version is None:
            yield Check(name, "failed", "not installed", fix)
        elif not SpecifierSet(wanted).contains(version, prereleases=True):
            yield Check(name, "failed", f"{version}, supported: {wanted}", fix)
        else:
            yield Check(name, "ok", version)


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    while not path.exists():
        path = path.parent
    return path


def _store(store: str) -> Iterator[Check]:
    if "://" in store and not store.startswith("file://"):
        yield Check("store", "ok", f"{store} (remote; not written to by this check)")
        return
    folder = Path(store.removeprefix("file://")).absolute()
    place = _existing(folder)
    fix = "Choose another place: --store FOLDER or MOEPIPE_STORE=FOLDER"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".moepipe-doctor-") as temporary:
            (Path(temporary) / "a").write_bytes(b"x")
            os.replace(Path(temporary) / "a", Path(temporary) / "b")
        yield Check("store", "ok", f"{folder} is writable")
    except OSError as error:
        yield Check("store", "failed", f"{folder}: {error.strerror or error}", fix)
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {place}"
    if free < _DISK_NEEDED:
        yield Check("disk space", "failed", detail, f"Free some space (moepipe gc --keep-last 3), or: {fix}")
    elif free < _DISK_ADVISED:
        yield Check("disk space", "warning", detail, "Full-size data sets need more: moepipe gc --keep-last 3")
    else:
        yield Check("disk space", "ok", detail)


def _shared_memory() -> Iterator[Check]:
    shm = Path("/dev/shm")
    if not shm.exists():
        yield Check("/dev/shm", "warning", "does not exist", "Ray falls back to slower files below its temp folder.")
        return
    total = shutil.disk_usage(shm).total
    fix = "" if total >= _SHM_ADVISED else "In a container: docker run --shm-size=4g ..."
    yield Check("/dev/shm", "warning" if fix else "ok", f"{total / 1e9:.1f} GB", fix)


def _tracking(uri: str) -> Iterator[Check]:
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=2).close()
            yield Check("MLflow", "ok", f"{uri} answers")
        except OSError as error:
            fix = "Start the server, or unset MLFLOW_TRACKING_URI. Runs work without it; then: moepipe track sync RUN"
            yield Check("MLflow", "warning", f"{uri}: {error.strerror or error}", fix)
    else:
        yield Check("MLflow", "ok", f"{uri} (local, made on first use)")


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Nobody listens on ``host:port`` and we may."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _ports() -> Iterator[Check]:
    for port, use in PORTS.items():
        if port_is_free(port):
            yield Check(f"port {port}", "ok", f"free ({use})")
        else:
            fix = "moepipe ui --port N uses another" if port == 5000 else "Ray takes the next free one"
            yield Check(f"port {port}", "warning", f"in use ({use})", fix)


def _ray_token() -> Iterator[Check]:
    """Ray writes its authentication token readable by everybody; whoever has it can run code on a cluster."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and token.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Check("Ray token", "warning", f"{token} is readable by other users", f"chmod 600 {token}")


def _data(root: Path) -> Iterator[Check]:
    from workers.datasets.base import DATASETS

    lacking = {name: bool(DATASETS.load(name).missing(root)) for name in DATASETS.names()}
    here = [name for name in lacking if not lacking[name]]
    gone = [name for name in lacking if lacking[name]]
    detail = f"{', '.join(here) or 'none'} present; not below {root}: {', '.join(gone) or 'none'}"
    fix = "" if here else "pip install 'moepipe[demo]' brings some; moepipe data verify NAME says how to get each"
    yield Check("data sets", "ok" if here else "warning", detail, fix)


def _torch(probe: subprocess.Popen[str]) -> Iterator[Check]:
    try:
        text, errors = probe.communicate(timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        yield Check(
            "import torch",
            "warning",
            f"takes longer than {_PROBE_SECONDS:.0f} s",
            "The machine is very busy; try again.",
        )
        return
    if probe.returncode != 0:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        yield Check(
            "import torch", "failed", last[0], "pip install -c constraints.txt --force-reinstall torch torchvision"
        )
        return
    seen = json.loads(text.strip().splitlines()[-1])
    yield Check("import torch", "ok", f"{seen['version']}, CUDA {seen['cuda'] or 'not built in'}")
    for line in seen["kernels"]:
        yield Check("expert kernels", "ok", line)
    gpus = ", ".join(seen["gpus"]) or "none: everything runs on the CPU"
    yield Check("GPU", "ok", gpus)
