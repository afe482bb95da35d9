"""Reports of adaptations as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serve.http.schemas import finite, state_json, verdict

if TYPE_CHECKING:
    from moe.errors import MoepipeError
    from serve.jobs import JobStatus
    from serve.requests import AdaptReport


def report_json(report: AdaptReport) -> dict[str, Any]:
    """:class:`serve.http.schemas.ReportAnswer`."""
    record = report.record
    return {
        "name": report.name,
        "method": report.method,
        "support": report.support,
        "steps": report.steps,
        "loss_before": finite(report.loss_before),
        "loss_after": finite(report.loss_after),
        "expert_weights": [float(weight) for weight in report.expert_weights],
        "collapse": verdict(report.collapse),
        "collapse_check": finite(dict(report.collapse)),
        "collapsed": bool(report.collapse.get("collapsed")),
        "dry_run": report.dry_run,
        "kept": record is not None,
        "seconds": report.seconds,
        "version": None if record is None else record.version,
        "bytes": None if record is None else record.bytes,
        "state": None if record is None else state_json(record),
    }


def job_json(status: JobStatus, tell: Callable[[MoepipeError], dict[str, str]]) -> dict[str, Any]:
    """:class:`serve.http.schemas.JobAnswer`.

    Args:
        status: of the job.
        tell: an error as code, message and fix.
    """
    return {
        "id": status.id,
        "status": status.status,
        "done": status.done,
        "total": status.total,
        "report": None if status.report is None else report_json(status.report),
        "error": None if status.error is None else tell(status.error),
    }
