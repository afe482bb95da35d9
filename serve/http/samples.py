"""Sample images for the browser page: ``offer_samples(api, Samples(folder))`` adds the two routes to an API."""

from __future__ import annotations

from fastapi import APIRouter, Depends, FastAPI, Response
from starlette.concurrency import run_in_threadpool

from serve.http.auth import tenant_of
from serve.http.errors import Json
from serve.page.samples import Samples


def offer_samples(api: FastAPI, samples: Samples) -> None:
    """Let the page of ``api`` try the pictures of ``samples``.

    Args:
        api: made by ``make_api``.
        samples: their folder.
    """
    router = APIRouter(include_in_schema=False, dependencies=[Depends(tenant_of)])

    @router.get("/v1/samples")
    async def listing() -> Response:
        """Names of the sample images."""
        return Json(await run_in_threadpool(samples.listing))

    @router.get("/v1/samples/{name:path}")
    async def read(name: str) -> Response:
        """One sample image."""
        content, media_type = await run_in_threadpool(samples.read, name)
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(content, media_type=media_type, headers=headers)

    api.include_router(router)
