"""The backend of a replica that predicts itself and sends adaptations elsewhere. No Ray here: the way is injected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from serve.http.problems import Refused
from serve.local import LocalBackend

if TYPE_CHECKING:
    from serve.adapting import AdaptReport, AdaptRequest, JobStatus
    from serve.http.backend import StreamAnswer, Work

Ask = Callable[..., Awaitable[Any]]


class RemoteBackend(LocalBackend):
    """A :class:`serve.local.LocalBackend` whose adaptations are made by somebody else.

    Args:
        ask: calls a method of the adapting side by name; raises what that side refused.
        most: adaptations of this process that may be under way.
        settings: of the local backend. Its experts are let go: only adaptations need them.
    """

    def __init__(self, ask: Ask, most: int, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self._answer, self._most, self._asked = ask, most, 0
        self.model.experts.clear()

    def check_room(self, work: Work) -> None:
        """See :meth:`serve.http.backend.Backend.check_room`."""
        if work == "predict":
            super().check_room(work)
        elif self._asked >= self._most:
            raise Refused(
                429, "overloaded", f"{self._asked} adaptations run or wait already.", "Try again later.", retry_after=5
            )

    async def _ask(self, method: str, *arguments: Any) -> Any:
        self._asked += 1
        try:
            return await self._answer(method, *arguments)
        finally:
            self._asked -= 1

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
        status: JobStatus = await self._answer("job", tenant, job)
        return status

    async def stream(self, request: AdaptRequest) -> StreamAnswer:
        """See :meth:`serve.http.backend.Backend.stream`."""
        answer: StreamAnswer = await self._ask("stream", request)
        return answer
