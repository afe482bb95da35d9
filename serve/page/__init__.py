"""The browser page: plain HTML, CSS and ES modules, served as they are.

There is no build step and nothing is fetched from another host, so the page works offline and under the strict policy
below. Its addresses are relative: it also works behind a gateway that adds a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

INDEX = "index.html"
MEDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        INDEX: "text/html; charset=utf-8",
        "page.css": "text/css; charset=utf-8",
        "page.js": "text/javascript; charset=utf-8",
        "images.js": "text/javascript; charset=utf-8",
        "shell.js": "text/javascript; charset=utf-8",
        "api.js": "text/javascript; charset=utf-8",
        "views.js": "text/javascript; charset=utf-8",
        "icon.svg": "image/svg+xml",
    }
)

# Everything from this server, nothing inline; blob: is for the thumbnails of images that have not left the browser.
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
)


@dataclass(frozen=True)
class PageFile:
    """One file of the page.

    Attributes:
        path: where it is served, ``/`` for the page itself.
        content: its bytes.
        media_type: value of ``Content-Type``.
    """

    path: str
    content: bytes
    media_type: str


@cache
def page_files() -> tuple[PageFile, ...]:
    """All files of the page, to be served without a token and with :data:`HEADERS`."""
    folder = resources.files(__name__)
    return tuple(
        PageFile("/" if name == INDEX else f"/{name}", folder.joinpath(name).read_bytes(), media_type)
        for name, media_type in MEDIA_TYPES.items()
    )
