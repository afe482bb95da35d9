"""Plain predictions for people: picture files in, labels and confidences out, before and after an adaptation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from serve.http.auth import tenant_of
from serve.http.bodies import limits_of
from serve.http.documents import REFERENCE_PATTERN, images_body, refusals
from serve.http.errors import Json
from serve.http.oip import backend_of
from serve.http.outputs import readable
from serve.http.schemas import ModelAnswer, PredictAnswer, model_json
from serve.http.uploads import read_images, require_known
from serve.records import parse_reference

router = APIRouter(tags=["Predictions"], responses=refusals())
Tenant = Annotated[str, Depends(tenant_of)]


@router.get("/v1/model", response_model=ModelAnswer)
async def model(request: Request, tenant: Tenant) -> Response:
    """What is served, and which adaptation methods fit it."""
    return Json(model_json(backend_of(request).info))


@router.post("/v1/predict", response_model=PredictAnswer, openapi_extra=images_body(uri=False))
async def predict(
    request: Request,
    tenant: Tenant,
    state: Annotated[
        str | None, Query(pattern=f"{REFERENCE_PATTERN}|^$", description="NAME or NAME.VERSION; also a field.")
    ] = None,
) -> Response:
    """Labels and confidences; with ``state`` by the base model and by the state, side by side."""
    backend = backend_of(request)
    upload = await read_images(request, backend, limits_of(request).max_rows)
    require_known(request, upload.fields, ("state",))
    reference = upload.fields.get("state") or state or None
    name, version = (None, None) if reference is None else parse_reference(reference)
    record = None
    after = None
    images = await backend.preprocess(upload.images)
    before = await backend.infer(images, tenant)
    if name is not None:
        adapted = await backend.infer(images, tenant, name, version)
        record, after = adapted.state, readable(backend.info, adapted.logits_BK)
    rows = readable(backend.info, before.logits_BK)
    return Json(
        {
            "model": backend.info.name,
            "model_version": backend.info.version,
            "state": None if record is None else f"{record.name}.{record.version}",
            "predictions": [
                {"name": upload.names[row], "before": rows[row], "after": None if after is None else after[row]}
                for row in range(len(rows))
            ],
        }
    )
