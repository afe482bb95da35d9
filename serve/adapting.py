"""Adaptation on request: unlabelled images of a domain in, a published state and a report out.

One request runs through: method and options checked (a reason is given when the method makes no sense for the model),
images prepared, experts' features (kept for a while by digest of the images), the method's steps on a private twin of
the base, collapse guard, delta, publication. What collapses or fails publishes nothing, so that the served state stays.
Each tensor of the base stays as it is. Requests take turns, some wait, the rest is refused; the same request under the
same idempotency key is carried out once.

Shapes: S support images, E experts, K outputs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe.adaptation.base import Adaptation, AdaptResult
from moe.adaptation.guard import Check, GuardSpec, check
from moe.adaptation.stream import overlay
from moe.errors import NotFoundError
from moe.student import Student
from serve.catalogue import Catalogue
from serve.delta import Delta
from serve.http.backend import StreamAnswer
from serve.jobs import Jobs, JobStatus, Progress, Turns
from serve.model import ServedModel
from serve.once import Claim, Once
from serve.planning import Plan, Planner
from serve.records import Facts, StateRecord
from serve.requests import AdaptReport, AdaptRequest
from serve.streaming import Streams
from serve.support import SupportCache

__all__ = ["AdaptReport", "AdaptRequest", "Adapter", "JobStatus", "Plan"]

_TOTAL = 100  # units of progress
_CLAIMS = ".idempotency"
_MOST_AT_ONCE = 4


class Adapter:
    """Adapts one served model; may be called from several threads.

    Args:
        model: base and teacher.
        catalogue: where states are published.
        guard: limits of the collapse guard.
        at_once: adaptations that compute at the same time; None: on a CPU what its cores carry, each
            with as many threads as torch has, at most four (each holds its activations); on a GPU one.
        queue: adaptations that may wait besides.
        max_images: of one request.
        max_steps: of one request.
        chunk: images of one pass, so that memory stays flat however many images come.
        cache_bytes: experts' features of recent support sets.
        keep_support: publish the support with a state; the catalogue keeps the smaller of the two, if the state comes
            out of it again bit by bit.
    """

    def __init__(
        self,
        model: ServedModel,
        catalogue: Catalogue,
        guard: GuardSpec | None = None,
        at_once: int | None = None,
        queue: int = 32,
        max_images: int = 4096,
        max_steps: int = 1000,
        chunk: int = 64,
        cache_bytes: int = 64 * 2**20,
        keep_support: bool = False,
    ) -> None:
        self.model, self.catalogue, self.guard = model, catalogue, guard or GuardSpec()
        self.plan = Planner(model, max_images, max_steps, chunk)
        self.keep_support = keep_support
        at_once = at_once or _places(model.device)
        self.turns = Turns(at_once, queue)
        self.jobs = Jobs(at_once + 1)
        self.support = SupportCache(model, cache_bytes, chunk)
        self.once = Once(catalogue.folder / _CLAIMS)
        self._streams = Streams(self)
        self._spare: list[Student] = []
        self._started: dict[tuple[str, str], tuple[str, str]] = {}
        self._lock = threading.Lock()
        if catalogue.recompute is None:
            catalogue.recompute = self.recompute

    # ---- requests --------------------------------------------------------------------------------------------------

    def adapt(self, request: AdaptRequest, progress: Progress | None = None) -> AdaptReport:
        """Adapt, judge and publish.

        Args:
            request: what is wanted.
            progress: told (units done, units in all) from time to time; may raise to give up.

        Raises:
            SpecError: see :meth:`plan`; also when there are too few images for the method.
            DataError: an image cannot be read by the model.
            Refused: 413; 429, too many adaptations wait; 409, the key belongs to another request.
            NoRoom, BusyError, EnvironmentProblem: the state cannot be published; the one that was served still is.
        """
        plan = self.plan(request)
        self.turns.reserve()
        try:
            return self._once_only(request, plan, progress or _silent)
        finally:
            self.turns.release()

    def start(self, request: AdaptRequest) -> str:
        """Like :meth:`adapt` in the background; returns the id of the job. Raises as :meth:`adapt`."""
        plan = self.plan(request)
        slot = None
        if request.idempotency_key is not None:
            slot = (request.tenant, request.idempotency_key)
            known, job = self._started.get(slot, ("", ""))
            if known == plan.fingerprint and self._remembered(job):
                return job
        self.turns.reserve()
        job = self.jobs.start(
            request.tenant, lambda progress: self._once_only(request, plan, progress), self.turns.release
        )
        if slot is not None:
            with self._lock:
                while len(self._started) >= 1000:
                    self._started.pop(next(iter(self._started)))
                self._started[slot] = (plan.fingerprint, job)
        return job

    def job(self, job: str, tenant: str | None = None) -> JobStatus:
        """How far a job is. Raises NotFoundError, also for jobs of another tenant than the one given."""
        return self.jobs.get(job, tenant)

    def stream(self, request: AdaptRequest) -> StreamAnswer:
        """Let a state follow the next batch of a stream, and predict it with that state. See :mod:`serve.streaming`."""
        return self._streams(request)

    def close(self) -> None:
        """Wait for running jobs."""
        self.jobs.close()

    def _remembered(self, job: str) -> bool:
        try:
            return self.jobs.get(job).status != "failed"
        except NotFoundError:
            return False

    # ---- carrying out ----------------------------------------------------------------------------------------------

    def _once_only(self, request: AdaptRequest, plan: Plan, progress: Progress) -> AdaptReport:
        if request.idempotency_key is None:
            return self._carry_out(request, plan, progress, None)
        with self.once.claim(request.tenant, request.idempotency_key, plan.fingerprint) as claim:
            if claim.report is not None:
                return AdaptReport.from_json(claim.report)
            report = self._carry_out(request, plan, progress, claim)
            claim.finish(report.to_json())
            return report

    def _carry_out(self, request: AdaptRequest, plan: Plan, progress: Progress, claim: Claim | None) -> AdaptReport:
        with self.turns.turn():
            begin = time.perf_counter()
            progress(0, _TOTAL)
            images = self.model.preprocess(request.images).to(self.model.device)
            progress(5, _TOTAL)
            tokens = self._tokens(plan, images, progress)
            start = self._beginning(request, plan)
            with self.private_base() as base:
                plan.method.on_step = lambda done, total: progress(60 + 35 * done // total, _TOTAL)
                result, found = self.compute(base, plan.method, images, tokens, start)
        delta = Delta({}) if found.collapsed else Delta.changed(self.model.state_dict(), result.delta)
        report = AdaptReport(
            name=request.name,
            method=request.method,
            support=len(request.images),
            steps=result.steps,
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            expert_weights=result.expert_weights or (),
            collapse=found.as_dict(),
            seconds=time.perf_counter() - begin,
            dry_run=request.dry_run,
            bytes=delta.nbytes,
            facts=result.facts,
        )
        if not (request.dry_run or found.collapsed):
            support = None
            if self.keep_support and not plan.follows:
                support = {"images": images} if tokens is None else {"images": images, "tokens": tokens}
            report = replace(report, record=self.publish(plan, delta, report, claim, support))
        progress(_TOTAL, _TOTAL)
        return report

    def compute(
        self,
        base: Student,
        method: Adaptation[Any],
        images: Tensor,
        tokens: Tensor | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> tuple[AdaptResult, Check]:
        """The method's result and the guard's verdict; nothing is published.

        Args:
            base: of :meth:`private_base`.
            method: with its options.
            images: prepared, ``[S, C, H, W]``, on the model's device.
            tokens: ``[S, E, D]`` for methods that need them.
            start: begin at this state instead of the base; the result's delta is then the whole state.
        """
        with _ordinary_tensors():
            model = overlay(base, start) if start else base
            result = method.adapt(model, images, tokens, self.model.aggregator)
            if start:
                result = replace(result, base=base, delta={**start, **result.delta}, logits_before=None)
            return result, check(base, images, result, self.model.info.task, self.guard, brief=True)

    def publish(
        self,
        plan: Plan,
        delta: Delta,
        report: AdaptReport,
        claim: Claim | None = None,
        support: Mapping[str, Tensor] | None = None,
    ) -> StateRecord:
        """Make the state public; an attempt that died after publishing the same is taken up instead of repeated."""
        if claim is not None and claim.since is not None:
            found = self._published(plan.request, delta, claim.since)
            if found is not None:
                return found
        facts = Facts(
            model_version=self.model.info.version,
            method=plan.request.method,
            options=plan.options,
            support=report.support,
            loss_before=report.loss_before,
            loss_after=report.loss_after,
            expert_weights=report.expert_weights,
            collapse=report.collapse,
            seconds=report.seconds,
        )
        return self.catalogue.publish(plan.request.tenant, plan.request.name, delta, facts, support)

    def _published(self, request: AdaptRequest, delta: Delta, since: float) -> StateRecord | None:
        try:
            versions = self.catalogue.versions(request.tenant, request.name)
        except NotFoundError:
            return None
        return next((v for v in versions if v.digest == delta.digest and v.created >= since - 1), None)

    def recompute(self, record: StateRecord, support: Mapping[str, Tensor]) -> Delta:
        """A state again from the tensors that were published with it (the catalogue's ``recompute``)."""
        method = self.plan.method(record.method, record.options)
        on_device = {name: value.to(self.model.device) for name, value in support.items()}
        with self.private_base() as base, _ordinary_tensors():
            result = method.adapt(base, on_device["images"], on_device.get("tokens"), self.model.aggregator)
        return Delta.changed(self.model.state_dict(), result.delta)

    def _tokens(self, plan: Plan, images: Tensor, progress: Progress) -> Tensor | None:
        if not plan.method.needs_teacher:
            return None
        return self.support.tokens(
            plan.images_digest, images, lambda done, total: progress(5 + 55 * done // total, _TOTAL)
        )

    def _beginning(self, request: AdaptRequest, plan: Plan) -> Mapping[str, Tensor] | None:
        """The state that is there, for a request that follows it."""
        if not plan.follows:
            return None
        try:
            kept = self.catalogue.resident(request.tenant, request.name)
        except NotFoundError:
            return None
        return {name: value.to(self.model.device) for name, value in kept.tensors.items()}

    @contextmanager
    def private_base(self) -> Iterator[Student]:
        """A twin of the base for one thread at a time."""
        with self._lock:
            twin = self._spare.pop() if self._spare else None
        if twin is None:
            twin = self.model.private_base()
        try:
            yield twin
        finally:
            with self._lock:
                self._spare.append(twin)


def _places(device: torch.device) -> int:
    """How many adaptations fill the device."""
    if device.type != "cpu":
        return 1
    return min(_MOST_AT_ONCE, max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads()))


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Out of any inference mode, and with gradients, whatever the thread was used for."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _silent(done: int, total: int) -> None:
    """Nobody wants to know."""
