"""Sample images that the page offers: the pictures in one folder, or in a folder for each domain, and nothing else.

The page asks ``GET /v1/samples`` for :meth:`Samples.listing` and ``GET /v1/samples/NAME`` for :meth:`Samples.read`. A
server without a folder answers with an empty list, and the page hides the button.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe.errors import NotFoundError

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MAX_SAMPLES = 32
MAX_DOMAINS = 32
MAX_BYTES = 2_000_000


class Samples:
    """The pictures of a folder, looked up anew at each call.

    Args:
        folder: holds ``.png``, ``.jpg`` or ``.webp`` files of at most 2 MB, or folders of such files, one a domain; of
            each the first 32 by name (9 before 10) are offered, and at most 32 domains. None offers nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def _files(self) -> dict[str, Path]:
        if self._folder is None or not self._folder.is_dir():
            return {}
        folders = (path for path in self._folder.iterdir() if path.is_dir() and not path.is_symlink())
        inside = sorted(folders, key=_natural)
        found = {path.name: path for path in _pictures(self._folder)}
        for domain in inside[:MAX_DOMAINS]:
            found |= {f"{domain.name}/{path.name}": path for path in _pictures(domain)}
        return found

    def listing(self) -> dict[str, Any]:
        """``{"samples": [{"name", "domain"}]}`` in the order of their names; the domain is "" for loose pictures."""
        return {"samples": [{"name": name, "domain": name.rpartition("/")[0]} for name in self._files()]}

    def read(self, name: str) -> tuple[bytes, str]:
        """Bytes and media type of one sample.

        Args:
            name: one of the listing; any other path is not.

        Raises:
            NotFoundError: no such sample.
        """
        path = self._files().get(name)
        if path is None:
            raise NotFoundError(f"There is no sample image {name[:80]!r}.", "GET /v1/samples lists them.")
        return path.read_bytes(), MEDIA_TYPES[path.suffix.lower()]


def _pictures(folder: Path) -> list[Path]:
    fit = (path for path in folder.iterdir() if path.suffix.lower() in MEDIA_TYPES and not path.is_symlink())
    small = (path for path in fit if path.is_file() and path.stat().st_size <= MAX_BYTES)
    return sorted(small, key=_natural)[:MAX_SAMPLES]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Key of an order by name in which numbers count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
