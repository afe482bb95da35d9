"""The adaptation API: domain states as resources, and the jobs that make them.

``POST /v1/states/{name}`` adapts to the images of its body and publishes a new version of the state; a collapsed or
failed adaptation publishes nothing. Every address sees the states of the token's tenant only; those of others do not
exist for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from serve.http.auth import tenant_of
from serve.http.bodies import limits_of, parse_json, read_body
from serve.http.documents import EXPORT, ROLLBACK_BODY, STATE_PATTERN, images_body, refusals
from serve.http.errors import Json, problem_of
from serve.http.oip import backend_of
from serve.http.outputs import readable
from serve.http.problems import Refused
from serve.http.reports import job_json, report_json
from serve.http.schemas import (
    JobAnswer,
    ReportAnswer,
    StateAnswer,
    StateDetails,
    StatesAnswer,
    StreamPrediction,
    state_json,
)
from serve.http.uploads import read_images, require_known

if TYPE_CHECKING:
    from serve.adapting import AdaptReport, AdaptRequest

T = TypeVar("T")
_KEY = r"^[A-Za-z0-9._:-]{1,128}$"
_MAX_OPTIONS = 4096
_STREAMED = ("method", "options", "step_cap", "dry_run")
DEFAULT_ORDER = ("distill", "bn", "tent", "none")

router = APIRouter(tags=["Domain states"], responses=refusals())
Tenant = Annotated[str, Depends(tenant_of)]
Name = Annotated[str, Path(pattern=STATE_PATTERN, description="Name of the domain state.")]
Version = Annotated[int | None, Query(ge=1, le=999_999_999, description="A version; the current one when left out.")]
Method = Annotated[
    str | None, Query(max_length=64, description="Adaptation method; the first that fits when left out.")
]
Options = Annotated[str | None, Query(max_length=_MAX_OPTIONS, description="Options of the method, a JSON object.")]
StepCap = Annotated[int | None, Query(ge=1, le=100_000, description="Most optimiser steps.")]
Key = Annotated[str | None, Header(alias="Idempotency-Key", pattern=_KEY, description="Repeats with it do no work.")]


async def _call(function: Callable[..., T], *arguments: Any) -> T:
    """A catalogue call in a thread: it reads and writes small files."""
    return await run_in_threadpool(function, *arguments)


@router.get("/v1/states", response_model=StatesAnswer)
async def list_states(request: Request, tenant: Tenant) -> Response:
    """Current versions of all states of this token."""
    records = await _call(backend_of(request).catalogue.list, tenant)
    return Json({"states": [state_json(record) for record in records]})


@router.post(
    "/v1/states/{name}",
    response_model=ReportAnswer,
    responses={202: {"model": JobAnswer, "description": "Accepted: ask GET /v1/jobs/{id}."}},
    openapi_extra=images_body(uri=True),
)
async def adapt(
    request: Request,
    tenant: Tenant,
    name: Name,
    method: Method = None,
    options: Options = None,
    step_cap: StepCap = None,
    dry_run: Annotated[bool, Query(description="Compute and report, publish nothing.")] = False,
    wait: Annotated[
        bool | None, Query(description="Wait for the report; by default up to some hundred images.")
    ] = None,
    key: Key = None,
) -> Response:
    """Adapt to unlabelled images and publish the state.

    The settings may also be fields of the form. The answer is the report, or 202 with a job.
    """
    backend, limits = backend_of(request), limits_of(request)
    upload = await read_images(request, backend, limits.max_support, uri=True)
    require_known(request, upload.fields, (*_STREAMED, "wait"))
    given = _Settings(upload.fields)
    asked = _request(request, tenant, name, method, options, step_cap, dry_run, upload.images, given, key)
    waits = given.flag("wait", len(upload.images) <= limits.async_support if wait is None else wait)
    if waits:
        report = await backend.adapt(asked)
        _observe(request, report)
        return Json(report_json(report))
    job = await backend.start(asked)
    status = job_json(await backend.job(tenant, job), problem_of)
    return Json(status, status_code=202, headers={"Location": f"/v1/jobs/{job}"})


@router.get("/v1/states/{name}", response_model=StateDetails)
async def get_state(request: Request, tenant: Tenant, name: Name, version: Version = None) -> Response:
    """A state and its kept versions."""
    catalogue = backend_of(request).catalogue
    record = await _call(catalogue.get, tenant, name, version)
    versions = await _call(catalogue.versions, tenant, name)
    return Json({**state_json(record), "versions": [state_json(item) for item in versions]})


@router.delete("/v1/states/{name}", status_code=204)
async def delete_state(request: Request, tenant: Tenant, name: Name) -> Response:
    """Remove a state with all versions; requests that use it now still finish with it."""
    await _call(backend_of(request).catalogue.delete, tenant, name)
    return Response(status_code=204)


@router.post("/v1/states/{name}/pin", response_model=StateAnswer)
async def pin(request: Request, tenant: Tenant, name: Name, version: Version = None) -> Response:
    """Keep a version in memory whatever else arrives."""
    return Json(state_json(await _call(backend_of(request).catalogue.pin, tenant, name, version)))


@router.post("/v1/states/{name}/unpin", response_model=StateAnswer)
async def unpin(request: Request, tenant: Tenant, name: Name, version: Version = None) -> Response:
    """Take the pin off."""
    return Json(state_json(await _call(backend_of(request).catalogue.unpin, tenant, name, version)))


@router.post("/v1/states/{name}/rollback", response_model=StateAnswer, openapi_extra=ROLLBACK_BODY)
async def rollback(request: Request, tenant: Tenant, name: Name, to: Version = None) -> Response:
    """Let an earlier version be the current one: the one before, or ``to`` (query, or JSON body)."""
    body = await _optional_json(request)
    if body:
        number = body.get("to")
        if set(body) != {"to"} or not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 10**9:
            raise Refused(422, "invalid", "The body is not {'to': VERSION}.", "Send a whole number from 1.")
        to = number
    return Json(state_json(await _call(backend_of(request).catalogue.rollback, tenant, name, to)))


@router.get("/v1/states/{name}/export", responses=EXPORT, response_class=Response)
async def export(request: Request, tenant: Tenant, name: Name, version: Version = None) -> Response:
    """The tensors of a state as a safetensors file, its record as metadata."""
    catalogue = backend_of(request).catalogue
    record = await _call(catalogue.get, tenant, name, version)
    content = await _call(catalogue.export, tenant, name, record.version)
    filename = f"{record.name}.{record.version}.safetensors"
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content, media_type="application/safetensors", headers=headers)


@router.get("/v1/jobs/{job}", response_model=JobAnswer)
async def get_job(
    request: Request, tenant: Tenant, job: Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
) -> Response:
    """How far an asynchronous adaptation is, and its report when it is done."""
    return Json(job_json(await backend_of(request).job(tenant, job), problem_of))


@router.post("/v1/stream/{name}", response_model=StreamPrediction, openapi_extra=images_body(uri=False))
async def stream(
    request: Request,
    tenant: Tenant,
    name: Name,
    method: Method = None,
    options: Options = None,
    step_cap: StepCap = None,
    dry_run: Annotated[bool, Query(include_in_schema=False)] = False,
    key: Key = None,
) -> Response:
    """Let the state follow the next images of a stream, under the same guards, and predict them with what it became.

    The settings may also be fields of the form. There is no dry run.
    """
    backend, limits = backend_of(request), limits_of(request)
    upload = await read_images(request, backend, limits.max_rows)
    require_known(request, upload.fields, _STREAMED)
    given = _Settings(upload.fields)
    asked = _request(request, tenant, name, method, options, step_cap, dry_run, upload.images, given, key)
    answer = await backend.stream(asked)
    _observe(request, answer.report)
    report = report_json(answer.report)
    return Json(
        {
            "model": backend.info.name,
            "state": None if report["state"] is None else report["state"]["reference"],
            "predictions": readable(backend.info, answer.logits_BK),
            "report": report,
        }
    )


def _request(
    request: Request,
    tenant: str,
    name: str,
    method: str | None,
    options: str | None,
    step_cap: int | None,
    dry_run: bool,
    images: list[Any],
    given: _Settings,
    key: str | None,
) -> AdaptRequest:
    """The request to the adapter, after what can be told at once; fields of the form count. Raises Refused (422)."""
    from serve.adapting import AdaptRequest

    method, options = given.text("method", method), given.text("options", options)
    step_cap, dry_run = given.number("step_cap", step_cap), given.flag("dry_run", dry_run)
    methods = backend_of(request).info.methods
    usable = [known for known, why in methods.items() if why is None]
    chosen = method or next((known for known in DEFAULT_ORDER if known in usable), "none")
    if chosen not in methods:
        told = f"Allowed: {', '.join(sorted(usable))}."
        raise Refused(422, "unknown-method", f"There is no adaptation method {chosen!r}.", told)
    if methods[chosen] is not None:
        told = f"Use one of: {', '.join(usable)}."
        raise Refused(422, "method-does-not-fit", f"Method {chosen!r} cannot be used: {methods[chosen]}.", told)
    try:
        settings = json.loads(options) if options else {}
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise Refused(422, "invalid", "The options are not a JSON object.", 'Write {"steps": 5}, say.')
    return AdaptRequest(tenant, name, chosen, settings, images, step_cap, dry_run, key)


def _observe(request: Request, report: AdaptReport) -> None:
    told = report_json(report)
    request.app.state.metrics.on_adapt(told["method"], told["seconds"], told["collapsed"])


async def _optional_json(request: Request) -> dict[str, Any]:
    """A JSON object, or nothing at all. Raises Refused (400, 422)."""
    body = await read_body(request)
    if not body:
        return {}
    document = await parse_json(body, limits_of(request).max_json_bytes)
    if not isinstance(document, dict):
        raise Refused(422, "invalid", "The body is not a JSON object.", "Send {'to': VERSION}, or no body.")
    return document


class _Settings:
    """Settings that may come as fields of the form; a field wins over the query.

    Raises:
        Refused: 422, from the methods, for a value of another kind.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    def text(self, name: str, other: str | None) -> str | None:
        value = self._fields.get(name, other)
        if value is not None and len(value) > _MAX_OPTIONS:
            raise self._wrong(name, "too long")
        return value or None

    def number(self, name: str, other: int | None) -> int | None:
        value = self._fields.get(name)
        if value is None or value == "":
            return other
        if not (value.isascii() and value.isdigit() and 0 < len(value) < 7 and int(value) > 0):
            raise self._wrong(name, "not a whole number from 1 to 999999")
        return int(value)

    def flag(self, name: str, other: bool) -> bool:
        value = self._fields.get(name)
        if value is None or value == "":
            return other
        if value.lower() not in ("true", "false", "1", "0"):
            raise self._wrong(name, "neither true nor false")
        return value.lower() in ("true", "1")

    @staticmethod
    def _wrong(name: str, why: str) -> Refused:
        return Refused(422, "invalid", f"The field {name!r} is {why}.", "See /docs.")
