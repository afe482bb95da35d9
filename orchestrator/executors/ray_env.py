"""The environment of an embedded Ray, set before ray is imported. No ray import here.

Ray's ports listen on every interface and whoever reaches them can run code, so an embedded Ray gets token
authentication with a token of our own, in a folder that only this user can read.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from moe.errors import EnvironmentProblem

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine imports torch twice in a minute or two
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def _has_gpu() -> bool:
    return any(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))


def temp_folder() -> Path:
    """This user's private folder for Ray sessions. Short: Ray makes socket paths of at most 107 bytes in it.

    Raises:
        EnvironmentProblem: somebody else made a folder of that name.
    """
    base = tempfile.gettempdir()
    folder = Path(base if len(base) <= 16 else "/tmp") / f"moepipe-ray-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"The folder {folder} cannot be made: {error.strerror}.", "Set TMPDIR.") from None
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise EnvironmentProblem(f"The folder {folder} belongs to another user.", "Set TMPDIR to a folder of your own.")
    folder.chmod(0o700)
    return folder


def _token(folder: Path) -> Path:
    path = folder / "token"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(handle, "w") as stream:
        stream.write(secrets.token_hex(32))
    return path


def prepare_environment() -> Path:
    """Set what is not set yet, for this process and all that Ray starts; return the folder for Ray's sessions."""
    folder = temp_folder()
    for name, value in _SETTINGS.items():
        if name != "DS_ACCELERATOR" or not _has_gpu():
            os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token(folder))
    return folder


def remove_dead_sessions(folder: Path) -> None:
    """Remove what sessions of killed drivers left behind; a session's name ends with its driver's pid."""
    for session in folder.glob("session_*_*"):
        pid = session.name.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(session, ignore_errors=True)
