"""The whole HTTP surface over one backend: routes, limits, errors, tokens, metrics and the browser page.

``make_api`` gives a FastAPI application that runs under any ASGI server and as the ingress of a Ray Serve deployment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.responses import Response

from serve.http import errors, oip, predict, states
from serve.http.auth import Tokens, tenant_of
from serve.http.backend import Backend
from serve.http.limits import Guard, Limits
from serve.http.metrics import CONTENT_TYPE, Metrics
from serve.page import HEADERS, PageFile, page_files

DESCRIPTION = """\
Predictions by the Open Inference Protocol, and domain states: post a few unlabelled images of a place that the model
has never seen, and get a state of the model adapted to that place.
"""


def make_api(
    backend: Backend, limits: Limits | None = None, tokens: Tokens | None = None, page: bool = True
) -> FastAPI:
    """The application.

    Args:
        backend: computes.
        limits: of requests.
        tokens: who may ask; everybody when left out.
        page: serve the browser page at ``/``.
    """
    limits, tokens = limits or Limits(), tokens or Tokens()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPIOffline(  # /docs with assets of this server instead of a content network's
        title="moepipe",
        version=version("moepipe"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs/assets",
        favicon_url="icon.svg" if page else None,
        swagger_ui_parameters={"validatorUrl": None},
    )
    metrics = Metrics(name_domains=not tokens.required)
    app.state.backend, app.state.limits, app.state.tokens, app.state.metrics = backend, limits, tokens, metrics
    backend.observe(metrics.on_batch, metrics.on_rows)
    errors.install(app)
    app.include_router(oip.router)
    app.include_router(predict.router)
    app.include_router(states.router)

    @app.get("/metrics", include_in_schema=False, dependencies=[Depends(tenant_of)])
    async def read_metrics() -> Response:
        """Prometheus text; needs a token when the server has tokens."""
        return Response(metrics.render(backend.gauges()), media_type=CONTENT_TYPE)

    if page:
        for file in page_files():
            _serve_file(app, file)
    app.add_middleware(Guard, limits=limits, observe=metrics.on_request, check_room=backend.check_room)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _serve_file(app: FastAPI, file: PageFile) -> None:
    async def read(request: Request) -> Response:
        return Response(file.content, media_type=file.media_type, headers=dict(HEADERS))

    app.add_api_route(file.path, read, methods=["GET"], include_in_schema=False)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. FastAPI's own schema of 422 is left out: our errors have one form."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
