"""Who may compute when, and work that goes on after its request was answered.

:class:`Turns` bounds both how many adaptations compute at once and how many wait; the rest is refused with 429 before
anything is computed. :class:`Jobs` runs work in threads and remembers how far it is and what came out, for a while.
Jobs live in the memory of one process: after a crash the client starts again, with the same idempotency key.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moe.errors import EnvironmentProblem, MoepipeError, NotFoundError
from serve.http.problems import Refused

if TYPE_CHECKING:
    from serve.requests import AdaptReport

Progress = Callable[[int, int], None]
Phase = Literal["queued", "running", "done", "failed"]


@dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    Attributes:
        id: its name, not to be guessed.
        tenant: owner.
        status: ``queued``, ``running``, ``done`` (with a report) or ``failed`` (with an error).
        done: units of work done.
        total: units of work in all.
        report: the outcome, once there is one.
        error: what went wrong, once something did.
    """

    id: str
    tenant: str
    status: Phase = "queued"
    done: int = 0
    total: int = 1
    report: AdaptReport | None = None
    error: MoepipeError | None = None


class Turns:
    """Places to wait and to compute.

    Args:
        at_once: adaptations that compute at the same time.
        queue: adaptations that may wait besides.
    """

    def __init__(self, at_once: int = 1, queue: int = 32) -> None:
        self.at_once, self.queue = max(1, at_once), max(0, queue)
        self._line: deque[threading.Event] = deque()  # a semaphore would let late comers overtake
        self._running = 0
        self._count = 0
        self._seconds = 1.0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Adaptations that compute or wait."""
        return self._count

    def check(self) -> None:
        """Raises Refused (429) when all places are taken."""
        if self._count >= self.at_once + self.queue:
            wait = self._seconds * self._count / self.at_once
            raise Refused(
                429, "overloaded", f"{self._count} adaptations run or wait already.", "Try again later.", wait
            )

    def reserve(self) -> None:
        """Take a place; give it back with :meth:`release`. Raises Refused (429) when all are taken."""
        with self._lock:
            self.check()
            self._count += 1

    def release(self) -> None:
        """Give a reserved place back."""
        with self._lock:
            self._count -= 1

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until it is this thread's turn to compute, first come first served; a place must be reserved."""
        mine = threading.Event()
        with self._lock:
            self._line.append(mine)
            self._call()
        mine.wait()
        start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                took = time.monotonic() - start
                self._seconds = 0.7 * self._seconds + 0.3 * took  # what Retry-After is estimated from
                self._running -= 1
                self._call()

    def _call(self) -> None:
        """Let the first in the line compute, as many as may; the lock is held."""
        while self._line and self._running < self.at_once:
            self._running += 1
            self._line.popleft().set()


class Jobs:
    """Work in threads.

    Args:
        threads: jobs that run at the same time.
        keep: ended jobs that are remembered.
        keep_seconds: for how long.
    """

    def __init__(self, threads: int = 1, keep: int = 1000, keep_seconds: float = 3600.0) -> None:
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="adapt")
        self._keep, self._keep_seconds = keep, keep_seconds
        self._jobs: OrderedDict[str, JobStatus] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def start(
        self, tenant: str, work: Callable[[Progress], AdaptReport], ended: Callable[[], None] | None = None
    ) -> str:
        """Run ``work`` as soon as a thread is free; returns the job's id at once.

        Args:
            tenant: owner.
            work: is given a function that it tells (units done, units in all).
            ended: called once when the job is over, however it ended.
        """
        job = secrets.token_hex(16)
        with self._lock:
            self._forget()
            self._jobs[job] = JobStatus(job, tenant)
        self._pool.submit(self._run, job, work, ended)
        return job

    def get(self, job: str, tenant: str | None = None) -> JobStatus:
        """How far a job is.

        Raises:
            NotFoundError: no such job, one of another tenant, or one that ended too long ago.
        """
        with self._lock:
            found = self._jobs.get(job)
        if found is None or (tenant is not None and found.tenant != tenant):
            raise NotFoundError(f"There is no job {job[:64]!r}.", "Jobs are forgotten some time after they ended.")
        return found

    def close(self) -> None:
        """Wait for running jobs and drop those that have not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: str, work: Callable[[Progress], AdaptReport], ended: Callable[[], None] | None) -> None:
        self._set(job, status="running")
        try:
            report = work(lambda done, total: self._set(job, done=done, total=total))
            self._set(job, status="done", report=report, done=self._jobs[job].total)
        except MoepipeError as error:
            self._set(job, status="failed", error=error)
        except Exception as error:  # a job must end; the thread has nobody to raise to
            problem = EnvironmentProblem(f"The adaptation failed: {type(error).__name__}.", "See the server's log.")
            problem.__cause__ = error
            self._set(job, status="failed", error=problem)
            raise
        finally:
            with self._lock:
                self._ended[job] = time.monotonic()
            if ended is not None:
                ended()

    def _set(self, job: str, **changes: object) -> None:
        with self._lock:
            self._jobs[job] = replace(self._jobs[job], **changes)  # type: ignore[arg-type]

    def _forget(self) -> None:
        limit = time.monotonic() - self._keep_seconds
        while self._ended and (len(self._ended) > self._keep or next(iter(self._ended.values())) < limit):
            job, _ = self._ended.popitem(last=False)
            self._jobs.pop(job, None)
