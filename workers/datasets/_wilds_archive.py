"""Takes an official WILDS archive, or a folder somebody has unpacked already, into the data root."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from workers.datasets._wilds import Layout, home


def take_in(archive: Path, root: Path, layout: Layout) -> Path:
    """Make ``archive`` the set ``layout.folder`` below ``root``.

    A ``.tar``, ``.tar.gz`` or ``.zip`` is unpacked beside its final place and moved there when it is complete, so an
    interrupted import leaves no half set. A folder is not copied: a symbolic link to it is made.

    Returns:
        The set's folder.

    Raises:
        NotFoundError: ``archive`` does not exist.
        DataError: it is damaged, has paths that lead outside, isn't this set, or the set is there already.
        EnvironmentProblem: the disk is full or not writable.
    """
    target = root / layout.folder
    if (home(root, layout) / layout.folder).exists() or target.is_symlink():
        raise DataError(
            f"{home(root, layout) / layout.folder} exists already.",
            "Remove it first to import another copy; `moepipe data verify` checks what is there.",
        )
    if not archive.exists():
        raise NotFoundError(f"{archive} does not exist.", f"Give the path of the {layout.name} archive or folder.")
    aside = root / f".{layout.folder}.{os.getpid()}.import"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if archive.is_dir():
            target.symlink_to(_inner(archive, archive, layout).resolve(), target_is_directory=True)
        else:
            aside.mkdir()
            unpack(archive, aside)
            os.replace(_inner(aside, archive, layout), target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise EnvironmentProblem(
                f"Cannot unpack {archive} below {root}: {os.strerror(error.errno)}.",
                "Free some space, or choose another data root with MOEPIPE_DATA.",
            ) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


# Python before 3.11.4 has no extraction filters; there, links are refused as well.
_FILTERS = hasattr(tarfile, "data_filter")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip file; members with absolute paths, parent references, links outside or devices are refused.

    Raises:
        DataError: such a member, or a damaged archive.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                for name in packed.namelist():
                    if not (folder / name).resolve().is_relative_to(folder.resolve()):
                        raise DataError(f"{archive}: member {name!r} leads outside the archive; nothing was imported.")
                packed.extractall(folder)
        else:
            with tarfile.open(archive) as packed_tar:
                if _FILTERS:
                    packed_tar.extractall(folder, filter="data")
                else:
                    for member in packed_tar:
                        inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
                        if not inside or not (member.isreg() or member.isdir()):
                            raise DataError(f"{archive}: has an unsafe member ({member.name}); nothing was imported.")
                    packed_tar.extractall(folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        if _FILTERS and isinstance(error, tarfile.FilterError):
            raise DataError(f"{archive}: has an unsafe member ({error}); nothing was imported.") from error
        raise DataError(
            f"{archive}: cannot be unpacked ({type(error).__name__}: {error}).",
            "It is probably truncated: compare its size with the official one and fetch it again.",
        ) from error


def _inner(folder: Path, archive: Path, layout: Layout) -> Path:
    """The folder in ``folder`` that holds the set: itself, as official archives have it, or the named one inside."""
    for candidate in (folder, folder / layout.folder):
        if all((candidate / table).is_file() for table in layout.tables):
            break
    else:
        raise DataError(
            f"{archive}: is not the {layout.name} set: {layout.tables[0]} is not at its top.",
            f"Expected {', '.join((*layout.tables, layout.images + '/', layout.release))}.",
        )
    absent = [name for name in (layout.images, layout.release) if not (candidate / name).exists()]
    if absent:
        raise DataError(
            f"{archive}: is incomplete, {', '.join(absent)} missing.",
            f"The official {layout.folder} archive has both; fetch it again.",
        )
    return candidate
