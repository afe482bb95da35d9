"""The backend of a replica that predicts itself and sends adaptations elsewhere. No Ray here: the way is injected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from serve.local import LocalBackend

if TYPE_CHECKING:
    from serve.adapting import AdaptReport, AdaptRequest, JobStatus
    from serve.http.backend import StreamAnswer

Ask = Callable[..., Awaitable[Any]]


class RemoteBackend(LocalBackend):
    """A :class:`serve.local.LocalBackend` whose adaptations are made by somebody else.

    Args:
        ask: calls a method of the adapting side by name; raises what that side refused.
        settings: of the local backend. Its experts are let go: only adaptations need them.
    """

    def __init__(self, ask: Ask, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self._ask = ask
        self.model.experts.clear()

    async def adapt(self, request: AdaptRequest) -> AdaptReport:
        """See :meth:`serve.http.backend.Backend.adapt`."""
        report: AdaptReport = await self._ask("adapt", request)
        return report

    async def start(self, request: AdaptRequest) -> str:
        """See :meth:`serve.http.backend.Backend.start`."""
        job: str = await self._ask("start", request)
        return job

    async def job(self, tenant: str, job: str) -> JobStatus:
        """See :meth:`serve.http.backend.Backend.job`."""
        status: JobStatus = await self._ask("job", tenant, job)
        return status

    async def stream(self, request: AdaptRequest) -> StreamAnswer:
        """See :meth:`serve.http.backend.Backend.stream`."""
        answer: StreamAnswer = await self._ask("stream", request)
        return answer
