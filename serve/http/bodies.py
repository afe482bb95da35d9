"""Reading a body whole: bounded bytes, transfer compression that cannot blow up, multipart that must be complete."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import AsyncGenerator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from serve.http.limits import Limits, charge
from serve.http.problems import Refused, too_large

_BOUNDARY = re.compile(rb"[ -~]{1,70}")
_OFF_LOOP = 64 << 10  # bytes from which parsing leaves the event loop
_WINDOW = {"gzip": 31, "deflate": 15}
_MAX_FIELDS = 32


def media_type(request: Request) -> str:
    """``Content-Type`` without parameters, in lower case; empty when absent."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def limits_of(request: Request) -> Limits:
    """The limits of the application."""
    limits: Limits = request.app.state.limits
    return limits


async def read_body(request: Request) -> bytes:
    """The whole body, decompressed.

    Raises:
        Refused: 400 when compressed data is corrupt or the sender went away, 413 when it grows above the limit,
            415 for an unknown compression.
    """
    limit = limits_of(request).max_body_bytes
    pieces = []
    try:
        async for piece in request.stream():
            pieces.append(piece)
    except ClientDisconnect:
        raise _gone() from None
    body = b"".join(pieces)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return body
    if encoding not in _WINDOW:
        raise Refused(
            415, "media-type", f"The content encoding {encoding[:40]!r} is not known.", "Use gzip or deflate."
        )
    plain = await run_in_threadpool(_inflate, body, _WINDOW[encoding], limit)
    charge(request.scope, len(plain))
    return plain


def _inflate(body: bytes, window: int, limit: int) -> bytes:
    machine = zlib.decompressobj(window)
    try:
        plain = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused(400, "bad-request", f"The compressed body is corrupt: {error}.") from None
    if len(plain) > limit:
        raise Refused(413, "too-large", f"The body grows above the limit of {limit} bytes when decompressed.")
    if not machine.eof or machine.unused_data:
        raise Refused(400, "bad-request", "The compressed body is truncated, or something follows it.")
    return plain


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises Refused: see :func:`parse_json` and :func:`read_body`."""
    body = await read_body(request)
    return await parse_json(body, limits_of(request).max_json_bytes)


async def parse_json(text: bytes, limit: int) -> Any:
    """A JSON document without NaN and infinities.

    Raises:
        Refused: 400 when it is not one, 413 above ``limit`` bytes.
    """
    if len(text) > limit:
        raise too_large("A JSON document", len(text), limit, "bytes", "Send large tensors as binary data.")
    return await run_in_threadpool(_parse, text) if len(text) > _OFF_LOOP else _parse(text)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(
            400, "bad-json", f"The body is not JSON: {str(error)[:120]}.", "Send one JSON document."
        ) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Parser(MultiPartParser):
    """Knows whether the closing boundary came: without it Starlette silently leaves out the unfinished part."""

    spool_max_size = 0  # files stay in memory, which the limits already bound, instead of filling a disk
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, max_files: int) -> tuple[list[UploadFile], dict[str, str]]:
    """Files (of any field, in order) and plain fields of a multipart body. The caller closes the files.

    Raises:
        Refused: 400 for a truncated or malformed body, 413 for more than ``max_files`` files.
    """
    content = request.headers.get("content-type", "")
    try:
        boundary = parse_options_header(content)[1].get(b"boundary", b"")
    except (ValueError, IndexError, UnicodeError):
        boundary = b""
    if not _BOUNDARY.fullmatch(boundary) or b'"' in boundary:
        raise Refused(400, "bad-multipart", "The header Content-Type of the multipart body has no proper boundary.")
    # Parameters other than the boundary (a charset, say) choose codecs in the parser: they are left out.
    headers = Headers(raw=[(b"content-type", b'multipart/form-data; boundary="' + boundary + b'"')])

    async def stream() -> AsyncGenerator[bytes, None]:
        try:
            async for piece in request.stream():
                yield piece
        except ClientDisconnect:
            raise _gone() from None

    parser = _Parser(headers, stream(), max_files=max_files, max_fields=_MAX_FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        text = error.message.rstrip(".")
        if text.startswith("Too many files"):
            raise Refused(
                413, "too-many-images", f"The body has more than {max_files} files.", "Send them in several requests."
            ) from None
        raise Refused(400, "bad-multipart", f"The multipart body is malformed: {text}.") from None
    if not parser.ended:
        await form.close()
        raise Refused(400, "bad-multipart", "The multipart body is truncated: its closing boundary is missing.")
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    return files, fields


def _gone() -> Refused:
    return Refused(400, "bad-request", "The sender went away before the body was complete.")
