"""Sample images that the page offers: the pictures in one folder, and nothing else of the disk.

The page asks ``GET /v1/samples`` for :meth:`Samples.listing` and ``GET /v1/samples/NAME`` for :meth:`Samples.read`. A
server without a folder answers with an empty list, and the page hides the button.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe.errors import NotFoundError

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MAX_SAMPLES = 32
MAX_BYTES = 2_000_000


class Samples:
    """The pictures of a folder, looked up anew at each call.

    Args:
        folder: holds ``.png``, ``.jpg`` or ``.webp`` files of at most 2 MB; the first 32 by name are offered. None
            offers nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def _files(self) -> dict[str, Path]:
        if self._folder is None or not self._folder.is_dir():
            return {}
        fit = (path for path in self._folder.iterdir() if path.suffix.lower() in MEDIA_TYPES and not path.is_symlink())
        small = sorted(path for path in fit if path.is_file() and path.stat().st_size <= MAX_BYTES)
        return {path.name: path for path in small[:MAX_SAMPLES]}

    def listing(self) -> dict[str, Any]:
        """``{"samples": [{"name"}]}`` in the order of their names."""
        return {"samples": [{"name": name} for name in self._files()]}

    def read(self, name: str) -> tuple[bytes, str]:
        """Bytes and media type of one sample.

        Args:
            name: one of the listing; a path of any kind is not.

        Raises:
            NotFoundError: no such sample.
        """
        path = self._files().get(name)
        if path is None:
            raise NotFoundError(f"There is no sample image {name[:80]!r}.", "GET /v1/samples lists them.")
        return path.read_bytes(), MEDIA_TYPES[path.suffix.lower()]
