"""One place where anything that goes wrong becomes a JSON answer: status, body, Retry-After.

``/v1`` answers ``{"error": {"code", "message", "fix"}}``. Under ``/v2`` the Open Inference Protocol wants ``error`` to
be a string, so there it is ``{"error": "message fix", "code", "message", "fix"}``. No answer holds a traceback, a path
of the server or the value of a secret.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moe.errors import (
    BusyError,
    CheckpointError,
    DataError,
    EnvironmentProblem,
    InfeasibleError,
    MoepipeError,
    NotFoundError,
    SpecError,
)
from serve.http.problems import Refused

log = logging.getLogger("moepipe.serve")

_STATUS: tuple[tuple[type[MoepipeError], int], ...] = (
    (NotFoundError, 404),
    (SpecError, 422),
    (DataError, 422),
    (CheckpointError, 422),
    (BusyError, 409),
    (InfeasibleError, 503),
    (EnvironmentProblem, 503),
)
_CODES = {
    400: "bad-request",
    401: "unauthorised",
    404: "not-found",
    405: "method-not-allowed",
    409: "conflict",
    413: "too-large",
    415: "media-type",
    422: "invalid",
    429: "overloaded",
    503: "unavailable",
}
_RETRY_SECONDS = 5.0
_PATH = re.compile(r"(?<![\w.])/[^\s:,]+")


class Json(Response):
    """A JSON answer in ASCII: lone surrogates from a request cannot break its encoding, and NaN is never written."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of ``content``."""
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def problem_body(path: str, code: str, message: str, fix: str, details: list[str] | None = None) -> dict[str, Any]:
    """The body of an error answer; its form depends on whether ``path`` belongs to the Open Inference Protocol."""
    told: dict[str, Any] = {"code": code, "message": message, "fix": fix}
    if details:
        told["details"] = details
    return {"error": f"{message} {fix}".strip(), **told} if path.startswith("/v2") else {"error": told}


def status_of(error: MoepipeError) -> int:
    """HTTP status of an error of ours; 500 for those that only a bug can let through."""
    own = getattr(error, "status", None)
    if isinstance(own, int):
        return own
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def problem_of(error: MoepipeError) -> dict[str, str]:
    """Code, message and fix of an error of ours, without anything that is the server's own affair."""
    status = status_of(error)
    if status == 500 or isinstance(error, EnvironmentProblem):
        log.error("%s: %s", error.code, error)  # may name files of the server: for the log, not for the client
        message, fix = "The server cannot do this at the moment.", "Try again later; the server's log has the cause."
    else:
        message, fix = error.message, error.hint
    if isinstance(error, CheckpointError):
        message = _PATH.sub("a file of the server", message)
    return {"code": str(getattr(error, "reason", error.code)), "message": message, "fix": fix}


def problem_response(path: str, error: MoepipeError) -> Json:
    """The answer to an error of ours.

    Args:
        path: of the request.
        error: its ``status``, ``reason`` and ``retry_after`` attributes are used where it has them.
    """
    status = status_of(error)
    if status == 500:
        return internal_response(path, error)
    told = problem_of(error)
    wait = getattr(error, "retry_after", None)
    if wait is None and status in (429, 503):
        wait = _RETRY_SECONDS
    headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="moepipe"'
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return Json(problem_body(path, told["code"], told["message"], told["fix"]), status_code=status, headers=headers)


def internal_response(path: str, error: BaseException) -> Json:
    """500 for what nobody foresaw; the log has the traceback, the client only learns that it happened."""
    log.error("unforeseen error while answering %s", path, exc_info=error)
    message = "The server met an error that nobody foresaw."
    return Json(problem_body(path, "internal", message, "Report it; the server's log has the details."), 500)


def install(app: FastAPI) -> None:
    """Make ``app`` answer every error in our form."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, MoepipeError)
        return problem_response(request.url.path, error)

    async def options(request: Request, error: Exception) -> Response:
        assert isinstance(error, ValidationError)
        return _invalid(request, error.errors(include_url=False, include_context=False, include_input=False))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(request, error.errors())

    async def plain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "bad-request" if error.status_code < 500 else "internal")
        fix = "The routes are listed at /docs." if error.status_code in (404, 405) else ""
        body = problem_body(request.url.path, code, f"{error.detail}.", fix)
        return Json(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(MoepipeError, ours)
    app.add_exception_handler(ValidationError, options)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)


def _invalid(request: Request, errors: Any) -> Json:
    details = [_told(item) for item in errors][:20]
    body = problem_body(request.url.path, "invalid", details[0] if details else "Invalid.", "See details.", details)
    return Json(body, status_code=422)


def _told(item: Mapping[str, Any]) -> str:
    """``query.step_cap: Input should be ...``; the value itself is left out, it may be large or secret."""
    where = ".".join(str(part) for part in item.get("loc", ()))
    return f"{where}: {item.get('msg', 'invalid')}" if where else str(item.get("msg", "invalid"))


__all__ = [
    "Json",
    "Refused",
    "install",
    "internal_response",
    "problem_body",
    "problem_of",
    "problem_response",
    "status_of",
]
