"""The client for ``asyncio``: the same methods as :class:`serve.client.Client`."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

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
)

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

A = TypeVar("A", bound="AsyncClient")


class AsyncClient(ClientBase):
    """See :class:`serve.client.Client` for the methods and their errors."""

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, timeout: float = 60.0, retries: int = 4
    ) -> None:
        super().__init__(url, token, timeout, retries)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self: A) -> A:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def _send(self, call: Call) -> httpx.Response:
        for attempt in range(self.retries + 1):
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self._http.request(call.method, call.path, **call.arguments)
            except httpx.TransportError as error:
                outcome = error
            wait = self._wait(call, attempt, outcome)
            if wait is None:
                break
            await asyncio.sleep(wait)
        return self._finish(call, outcome)

    async def _json(self, call: Call) -> dict[str, Any]:
        return dict((await self._send(call)).json())

    async def ready(self) -> bool:
        """See :meth:`serve.client.Client.ready`."""
        try:
            return (await self._http.get("/v2/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def model(self) -> dict[str, Any]:
        """See :meth:`serve.client.Client.model`."""
        return await self._json(get_call("/v1/model"))

    async def infer(self, images_BCHW: NDArray[np.float32], state: str | None = None) -> NDArray[np.float32]:
        """See :meth:`serve.client.Client.infer`."""
        name = str((await self.model())["name"])
        return read_infer(await self._send(infer_call(name, images_BCHW, state)))

    async def predict(self, images: Images, state: str | None = None) -> dict[str, Any]:
        """See :meth:`serve.client.Client.predict`."""
        return await self._json(predict_call(images, state))

    async def adapt(
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
        """See :meth:`serve.client.Client.adapt`."""
        key = idempotency_key or uuid.uuid4().hex
        settings: dict[str, Any] = {"uri": uri, "method": method, "options": options, "step_cap": step_cap}
        call = adapt_call(name, images, **settings, dry_run=dry_run, key=key, wait=progress is None)
        answer = await self._json(call)
        if progress is None:
            return answer
        while (report := job_report(answer, progress)) is None:
            await asyncio.sleep(POLL_S)
            answer = await self.job(str(answer["id"]))
        return report

    async def start_adapt(self, name: str, images: Images, **settings: Any) -> dict[str, Any]:
        """See :meth:`serve.client.Client.start_adapt`."""
        return await self._json(start_call(name, images, settings))

    async def stream(self, name: str, images: Images, **settings: Any) -> dict[str, Any]:
        """See :meth:`serve.client.Client.stream`."""
        return await self._json(stream_call(name, images, settings))

    async def job(self, job: str) -> dict[str, Any]:
        """See :meth:`serve.client.Client.job`."""
        return await self._json(get_call(f"/v1/jobs/{job}"))

    async def states(self) -> list[dict[str, Any]]:
        """See :meth:`serve.client.Client.states`."""
        return list((await self._json(get_call("/v1/states")))["states"])

    async def state(self, name: str) -> dict[str, Any]:
        """See :meth:`serve.client.Client.state`."""
        return await self._json(get_call(state_path(name)))

    async def pin(self, name: str) -> dict[str, Any]:
        """See :meth:`serve.client.Client.pin`."""
        return await self._json(send_call("POST", state_path(name, "pin")))

    async def unpin(self, name: str) -> dict[str, Any]:
        """See :meth:`serve.client.Client.unpin`."""
        return await self._json(send_call("POST", state_path(name, "unpin")))

    async def rollback(self, name: str, to: int | None = None) -> dict[str, Any]:
        """See :meth:`serve.client.Client.rollback`."""
        return await self._json(send_call("POST", state_path(name, "rollback"), {} if to is None else {"to": to}))

    async def delete(self, name: str) -> None:
        """See :meth:`serve.client.Client.delete`."""
        await self._send(send_call("DELETE", state_path(name)))

    async def export(self, name: str, path: Path) -> Path:
        """See :meth:`serve.client.Client.export`."""
        content = (await self._send(get_call(state_path(name, "export")))).content
        await asyncio.to_thread(path.write_bytes, content)
        return path
