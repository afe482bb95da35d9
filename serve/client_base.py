"""What the blocking and the asynchronous client share: settings, when to try again, what a refusal means."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from typing import Any

import httpx

from serve.wire import Call, Images, adapt_call, failure, retry_after, told_failure, unreachable

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_S = 0.5
_RETRIED = (429, 503)
Progress = Callable[[int, int], None]


class ClientBase:
    """What both clients are made of."""

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, timeout: float = 60.0, retries: int = 4
    ) -> None:
        self.url = url.rstrip("/")
        self.retries = retries
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "timeout": httpx.Timeout(timeout, connect=min(timeout, 5.0)),
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "trust_env": False,  # a proxy of the environment has no business between us and a local server
        }

    def _wait(self, call: Call, attempt: int, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds until the next attempt; None when there is none."""
        if attempt >= self.retries:
            return None
        if isinstance(outcome, httpx.Response):
            if outcome.status_code not in _RETRIED:
                return None
            return retry_after(outcome, attempt)
        if isinstance(outcome, httpx.ConnectError) or call.idempotent:
            return min(0.2 * 2.0**attempt, 5.0) * (0.5 + random.random())
        return None

    def _finish(self, call: Call, outcome: httpx.Response | httpx.TransportError) -> httpx.Response:
        """The answer of the last attempt, or the error that it stands for."""
        if isinstance(outcome, httpx.TransportError):
            raise unreachable(self.url, call, outcome)
        if outcome.is_error:
            raise failure(outcome)
        return outcome


def start_call(name: str, images: Images, settings: dict[str, Any]) -> Call:
    """The request that starts a job."""
    known = {"uri": None, "method": None, "options": None, "step_cap": None, "dry_run": False, **settings}
    key = known.pop("idempotency_key", None) or uuid.uuid4().hex
    return adapt_call(name, images, **known, key=key, wait=False)


def job_report(answer: dict[str, Any], progress: Progress) -> dict[str, Any] | None:
    """The report of a job that has ended, else None. Raises what the job failed with."""
    if "status" not in answer:  # small sets may be answered at once
        return answer
    progress(int(answer["done"]), int(answer["total"]))
    if answer["status"] == "failed":
        raise told_failure(answer.get("error") or {})
    return dict(answer["report"]) if answer["status"] == "done" else None
