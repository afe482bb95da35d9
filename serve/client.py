"""The Python client of a running server: :class:`Client`, and :class:`AsyncClient` for ``asyncio``.

Requests are built and answers read by plain functions, so the two differ only in how they wait. Retried are only
requests that may be sent twice: a refused connection, 429 and 503 (after the server's ``Retry-After``), and a broken
connection where the request is idempotent; an adaptation is, through its ``Idempotency-Key``.

Shapes: B images, C channels, H and W pixels, K outputs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from serve.async_client import AsyncClient
from serve.client_base import DEFAULT_URL, POLL_S, ClientBase, Progress, job_report, start_call
from serve.wire import (
    Call,
    Images,
    adapt_call,
    get_call,
    infer_call,
    predict_call,
    read_infer,
    send_call,
    state_path,
    stream_call,
    unreachable,
)

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DEFAULT_URL", "AsyncClient", "Client"]

C = TypeVar("C", bound="Client")


class Client(ClientBase):
    """A blocking client; use it as a context manager, or :meth:`close` it.

    Every method raises the project's own errors: NotFoundError (no such state or model), SpecError (the request does
    not fit), DataError (the images do not), BusyError (overloaded, or in use; after the retries), EnvironmentProblem
    (nobody answers, or the server's own fault).

    Args:
        url: address of the server.
        token: bearer token; none when the server asks for none.
        timeout: seconds for one request.
        retries: further attempts after the first.
    """

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, timeout: float = 60.0, retries: int = 4
    ) -> None:
        super().__init__(url, token, timeout, retries)
        self._http = httpx.Client(**self._options)

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def _send(self, call: Call) -> httpx.Response:
        for attempt in range(self.retries + 1):
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self._http.request(call.method, call.path, **call.arguments)
            except httpx.TransportError as error:
                outcome = error
            wait = self._wait(call, attempt, outcome)
            if wait is None:
                break
            time.sleep(wait)
        return self._finish(call, outcome)

    def _json(self, call: Call) -> dict[str, Any]:
        return dict(self._send(call).json())

    # ---- the model -------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """The model is loaded and predictions will be answered; False while the server starts or is away."""
        try:
            return self._http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_ready(self, timeout: float = 120.0, given_up: Callable[[], bool] = bool) -> None:
        """Block until :meth:`ready`.

        Raises:
            EnvironmentProblem: after ``timeout`` seconds, or as soon as ``given_up()`` is true (the server ended, say).
        """
        deadline = time.monotonic() + timeout
        while not self.ready():
            if time.monotonic() > deadline or given_up():
                raise unreachable(self.url, get_call("/v2/health/ready"), None)
            time.sleep(0.2)

    def model(self) -> dict[str, Any]:
        """What is served: name, version, task, classes, image size, and which adaptation methods fit."""
        return self._json(get_call("/v1/model"))

    def infer(self, images_BCHW: NDArray[np.float32], state: str | None = None) -> NDArray[np.float32]:
        """Logits ``[B, K]`` of prepared images (float32, already transformed), by the Open Inference Protocol.

        Args:
            images_BCHW: the network's input.
            state: ``NAME`` or ``NAME.VERSION`` of a domain state; None asks the base.
        """
        return read_infer(self._send(infer_call(str(self.model()["name"]), images_BCHW, state)))

    def predict(self, images: Images, state: str | None = None) -> dict[str, Any]:
        """Labels and confidences of pictures; with ``state`` both before and after the adaptation.

        Args:
            images: paths of picture files, their bytes, or uint8 arrays ``[H, W, C]`` or ``[H, W]``.
            state: as :meth:`infer`.
        """
        return self._json(predict_call(images, state))

    # ---- domain states ---------------------------------------------------------------------------------------------

    def adapt(
        self,
        name: str,
        images: Images | None = None,
        *,
        uri: str | None = None,
        method: str | None = None,
        options: dict[str, Any] | None = None,
        step_cap: int | None = None,
        dry_run: bool = False,
        idempotency_key: str | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Make or renew the state ``name`` from unlabelled images; returns the report.

        Args:
            name: of the state.
            images: as :meth:`predict`.
            uri: instead of images, a data set that the server knows: ``dataset:NAME/SPLIT/DOMAIN``.
            method: adaptation method; None takes the server's default for the model.
            options: of the method.
            step_cap: most optimiser steps.
            dry_run: compute and report, publish nothing.
            idempotency_key: the same key gives the same answer without working twice; a new one by default.
            progress: called with (done, total) while the server works; the request is then asynchronous.
        """
        key = idempotency_key or uuid.uuid4().hex
        settings: dict[str, Any] = {"uri": uri, "method": method, "options": options, "step_cap": step_cap}
        call = adapt_call(name, images, **settings, dry_run=dry_run, key=key, wait=progress is None)
        answer = self._json(call)
        if progress is None:
            return answer
        while (report := job_report(answer, progress)) is None:
            time.sleep(POLL_S)
            answer = self.job(str(answer["id"]))
        return report

    def start_adapt(self, name: str, images: Images, **settings: Any) -> dict[str, Any]:
        """Like :meth:`adapt`, but returns the job at once; ask :meth:`job` for it."""
        return self._json(start_call(name, images, settings))

    def stream(self, name: str, images: Images, **settings: Any) -> dict[str, Any]:
        """Feed the next images of a stream to the state ``name``; returns predictions, and the state that followed.

        Args:
            name: of the state.
            images: as :meth:`predict`.
            settings: ``method``, ``options``, ``step_cap`` and ``idempotency_key`` as :meth:`adapt`; without a key
                nothing is sent twice.
        """
        return self._json(stream_call(name, images, settings))

    def job(self, job: str) -> dict[str, Any]:
        """How far an asynchronous adaptation is."""
        return self._json(get_call(f"/v1/jobs/{job}"))

    def states(self) -> list[dict[str, Any]]:
        """All states of this client's token."""
        return list(self._json(get_call("/v1/states"))["states"])

    def state(self, name: str) -> dict[str, Any]:
        """One state with its versions."""
        return self._json(get_call(state_path(name)))

    def pin(self, name: str) -> dict[str, Any]:
        """Keep the state in memory whatever else arrives."""
        return self._json(send_call("POST", state_path(name, "pin")))

    def unpin(self, name: str) -> dict[str, Any]:
        """Take the pin off."""
        return self._json(send_call("POST", state_path(name, "unpin")))

    def rollback(self, name: str, to: int | None = None) -> dict[str, Any]:
        """Serve an earlier version again (the one before by default)."""
        return self._json(send_call("POST", state_path(name, "rollback"), {} if to is None else {"to": to}))

    def delete(self, name: str) -> None:
        """Remove the state and all of its versions."""
        self._send(send_call("DELETE", state_path(name)))

    def export(self, name: str, path: Path) -> Path:
        """Write the state's tensors to a safetensors file; returns its path."""
        path.write_bytes(self._send(get_call(state_path(name, "export"))).content)
        return path
