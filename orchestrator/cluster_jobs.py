"""Submitting through Ray Jobs: the driver runs on the cluster, this machine may leave.

What travels is the resolved pipeline, never data or code: the cluster has the same wheel and reads the same store. A
job is named after its run, so submitting twice attaches to the job that is there; one that has ended is followed by a
job with the next number, which continues the run.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import EnvironmentProblem, NotFoundError

SUBMISSION = "submission.json"
RUNNING = ("PENDING", "RUNNING")
_POLL_S = 0.5
PATIENCE_S = 60.0


def _program() -> str:
    """How moepipe is called on the cluster."""
    return os.environ.get("MOEPIPE_REMOTE_PROGRAM", "moepipe")


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        job: its submission id.
        status: ``SUCCEEDED``, ``FAILED``, ``STOPPED`` (or ``RUNNING`` when it was only looked at).
        exit_code: of its driver, as a shell would give it.
        message: Ray's words.
    """

    job: str
    status: str
    exit_code: int
    message: str


class _Passed:
    """Passes a text on once, however often its beginning comes again."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._seen = write, 0

    def take(self, text: str, position: int) -> None:
        """A piece of the text that begins at ``position``."""
        new = text[max(0, self._seen - position) :]
        if new:
            self._write(new)
            self._seen = position + len(text)


class Jobs:
    """The jobs of one cluster.

    Args:
        address: ``http://host:8265``; a token is taken from ``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN_PATH``.

    Raises:
        EnvironmentProblem: nobody answers there, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.job_submission import JobSubmissionClient

        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except Exception as error:  # ConnectionError, or RuntimeError with the server's words
            raise EnvironmentProblem(
                f"No Ray dashboard at {address}: {str(error).splitlines()[0][:200]}.",
                "Is the cluster up, is there a tunnel (ray dashboard cluster.yaml), is the token right "
                "(RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=...)?",
            ) from None

    def of_run(self, run: str) -> list[str]:
        """Submission ids of a run's jobs, oldest first."""
        ids = [job.submission_id for job in self._client.list_jobs() if job.submission_id]
        mine = [
            name for name in ids if name == run or (name.startswith(f"{run}.") and name.rpartition(".")[2].isdigit())
        ]
        return sorted(mine, key=lambda name: 1 if name == run else int(name.rpartition(".")[2]))

    def submit(self, run: str, submission: Mapping[str, Any]) -> tuple[str, bool]:
        """Start a job for ``run``, or find the one that is running.

        Returns:
            (submission id, whether it is new)
        """
        earlier = self.of_run(run)
        if earlier and self.status(earlier[-1]) in RUNNING:
            return earlier[-1], False
        job = run if not earlier else f"{run}.{len(earlier) + 1}"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / SUBMISSION).write_text(json.dumps(submission))
            try:
                self._client.submit_job(
                    entrypoint=f"{_program()} cluster drive {SUBMISSION}",
                    submission_id=job,
                    runtime_env={"working_dir": folder},
                    metadata={"moepipe_run": run},
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise EnvironmentProblem(f"The cluster refused the job: {str(error)[:300]}.") from None
                return job, False  # somebody submitted the same name a moment ago
        return job, True

    def run_command(self, name: str, words: list[str]) -> Ended:
        """Run a command of moepipe on the head and wait; its output is that of :meth:`logs`."""
        job = f"{name}-{int(time.time() * 1000):x}"
        self._client.submit_job(entrypoint=f"{_program()} {shlex.join(words)}", submission_id=job)
        while self.status(job) in RUNNING:
            time.sleep(_POLL_S)
        return self.ended(job)

    def status(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``."""
        return str(self._client.get_job_status(job).value)

    def ended(self, job: str) -> Ended:
        """How a job ended (or that it runs)."""
        info = self._client.get_job_info(job)
        status, code = str(info.status.value), info.driver_exit_code
        if code is None:
            code = {"SUCCEEDED": 0, "STOPPED": 130}.get(status, 1)
        elif code < 0:
            code = 128 - code
        return Ended(job, status, int(code), str(info.message or ""))

    def logs(self, job: str) -> str:
        """What the driver has written so far."""
        return str(self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None], patience_s: float = PATIENCE_S) -> Ended:
        """Pass on what the driver writes until it ends. A connection that breaks is made again.

        Raises:
            EnvironmentProblem: the head has not answered, or has not known the job, for ``patience_s``.
        """
        passed = _Passed(write)
        silent: float | None = None
        while True:
            with suppress(Exception):  # whatever the web client makes of a dashboard that restarts
                asyncio.run(self._tail(job, passed))
            try:
                running = self.status(job) in RUNNING
                silent = None
            except Exception as error:  # the same
                silent = silent or time.monotonic()
                if time.monotonic() - silent > patience_s:
                    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
                    raise EnvironmentProblem(
                        f"The head has not answered for {patience_s:g} s: {said}.",
                        "When the cluster is up again, submit the same pipeline with the same --run: it goes on "
                        "from the store.",
                    ) from None
                time.sleep(_POLL_S)
                continue
            if not running:
                break
            time.sleep(_POLL_S)
        passed.take(self.logs(job), 0)
        return self.ended(job)

    async def _tail(self, job: str, passed: _Passed) -> None:
        position = 0
        async for text in self._client.tail_job_logs(job):
            passed.take(text, position)
            position += len(text)

    def stop(self, run: str) -> str:
        """Ask the running job of a run to stop at its members' next checkpoints; returns its id.

        Raises:
            NotFoundError: it has no running job.
        """
        running = [job for job in self.of_run(run) if self.status(job) in RUNNING]
        if not running:
            raise NotFoundError(f"Run {run} has no running job at {self.address}.", "moepipe cluster jobs lists them.")
        self._client.stop_job(running[-1])
        return running[-1]

    def nodes(self) -> builtins.list[str]:
        """Addresses of the nodes that are alive; empty while the dashboard cannot say."""
        from ray.util.state import list_nodes

        with suppress(Exception):  # several kinds, while the head's processes start
            found = list_nodes(self.address, filters=[("state", "=", "ALIVE")], raise_on_missing_output=False)
            return sorted(str(node.node_ip) for node in found)
        return []

    def list(self) -> builtins.list[dict[str, Any]]:
        """Jobs of runs, newest first: run, job, status, start."""
        found = [job for job in self._client.list_jobs() if (job.metadata or {}).get("moepipe_run")]
        found.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [
            {
                "run": job.metadata["moepipe_run"],
                "job": job.submission_id,
                "status": str(job.status.value),
                "started": (job.start_time or 0) / 1000,
            }
            for job in found
        ]
