"""Taking a set in: an archive is unpacked beside its final place and moved there, an unpacked folder is linked."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from workers.datasets._folder_index import subfolders
from workers.datasets._wilds_archive import unpack

_DEPTH = 3  # folders that an archive may wrap around the set
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def take_in(target: Path, name: str, archive: Path, is_set: Callable[[Path], bool], wanted: str) -> Path:
    """Make ``archive`` the folder ``target``.

    Args:
        target: where the set will lie.
        name: of the set.
        archive: a folder (linked, not copied), or a tar or zip file.
        is_set: tells the set's folder, which may lie some folders deep.
        wanted: in words, what that folder holds.

    Raises:
        NotFoundError: ``archive`` does not exist.
        DataError: it is damaged, unsafe, isn't this set, or ``target`` exists.
        EnvironmentProblem: the disk is full or not writable.
    """
    if target.exists() or target.is_symlink():
        raise DataError(f"{target} exists already.", "Remove it first to import another copy.")
    if not archive.exists():
        raise NotFoundError(f"{archive} does not exist.", f"Give the path of the {name} archive or folder.")
    aside = target.parent / f".{target.name}.{os.getpid()}.import"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if archive.is_dir():
            target.symlink_to(_inner(archive, archive, name, is_set, wanted).resolve(), target_is_directory=True)
        else:
            aside.mkdir()
            unpack(archive, aside)
            os.replace(_inner(aside, archive, name, is_set, wanted), target)
    except OSError as error:
        if error.errno in _DISK:
            raise EnvironmentProblem(
                f"Cannot take {archive} in below {target.parent}: {os.strerror(error.errno)}.",
                "Free some space, or choose another data root with MOEPIPE_DATA.",
            ) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _inner(folder: Path, archive: Path, name: str, is_set: Callable[[Path], bool], wanted: str) -> Path:
    """The first folder (breadth first) at or below ``folder`` that is the set."""
    level = [folder]
    for _ in range(_DEPTH + 1):
        for place in level:
            if is_set(place):
                return place
        level = [place / inner for place in level for inner in subfolders(place)]
    raise DataError(
        f"{archive}: is not {name}: no folder in it holds {wanted}.",
        "Official releases in several archives are unpacked into one folder first; import that folder.",
    )
