"""From a cluster's YAML to an address: its token, and an ssh tunnel to the dashboard (it listens on loopback only)."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.errors import EnvironmentProblem, NotFoundError, SpecError

TOKEN = Path("~/.moepipe/ray_token")
_WAIT_S = 60.0


def read_cluster(path: Path) -> dict[str, Any]:
    """A cluster's YAML.

    Raises:
        NotFoundError, SpecError: it is not there, or not YAML of a cluster.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise NotFoundError(f"There is no file {path}.", "cluster.yaml and deploy/ hold some to start from.")
    try:
        config = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise SpecError(f"{path} is not YAML: {str(error).splitlines()[0]}.", "Compare it with cluster.yaml.") from None
    if not isinstance(config, dict) or "cluster_name" not in config or "provider" not in config:
        raise SpecError(f"{path} describes no cluster.", "It needs cluster_name and provider: see cluster.yaml.")
    return config


def use_token(config: dict[str, Any]) -> Path | None:
    """Let this process use the token that the cluster's hosts are given (the mounted file ``ray_token``)."""
    for there, here in (config.get("file_mounts") or {}).items():
        if Path(there).name == "ray_token":
            token = Path(here).expanduser()
            if not token.is_file():
                raise NotFoundError(f"There is no token {token}.", "Make it with: moepipe cluster token")
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
            return token
    return None


def make_token(path: Path) -> bool:
    """Write a new token that only this user can read; False when there is one already (its mode is put right)."""
    path = path.expanduser()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            path.chmod(0o600)
        return False
    with os.fdopen(handle, "w") as stream:
        stream.write(secrets.token_hex(32))
    return True


def ray_environment(config: dict[str, Any]) -> dict[str, str]:
    """The environment in which to call ``ray up`` and its relatives for this cluster."""
    local = (config.get("provider") or {}).get("type") == "local"
    # The second version of the autoscaler counts the head among the local workers and starts one too few.
    return {**os.environ, **({"RAY_UP_enable_autoscaler_v2": "0"} if local else {}), "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def address_of(where: str) -> Iterator[str]:
    """The dashboard's address: ``where`` itself, or through a tunnel when it is a cluster's YAML.

    Raises:
        EnvironmentProblem: the tunnel does not open.
    """
    if where.startswith(("http://", "https://")):
        yield where
        return
    config = read_cluster(Path(where))
    use_token(config)
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "dashboard",
        where,
        "--port",
        str(port),
        "--no-config-cache",
    ]
    with tempfile.TemporaryFile() as said:
        tunnel = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=ray_environment(config),
            start_new_session=True,
        )
        try:
            _wait_for(port, tunnel, said, where)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(tunnel)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, tunnel: subprocess.Popen[bytes], said: Any, where: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and tunnel.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.3)
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    raise EnvironmentProblem(
        f"No tunnel to the head of {where}: {lines[-1][:200] if lines else 'no answer'}.",
        f"Is the cluster up (moepipe cluster up {where}), may this machine reach it by ssh?",
    )


def _end(tunnel: subprocess.Popen[bytes]) -> None:
    """The tunnel is a shell around ssh in a session of its own: end them all."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(tunnel.pid, number)
            tunnel.wait(timeout=5)
            return
        except ProcessLookupError:
            tunnel.wait(timeout=5)
            return
        except subprocess.TimeoutExpired:
            continue
