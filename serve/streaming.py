"""Streams on request: each batch is predicted by a state that has just followed it, and that state is published.

What a stream remembers besides its state (moments, averages, the window of the guard) lives in the memory of one
process. When it is lost, or when somebody else published, rolled back or deleted the state, the stream goes on from
what the catalogue holds, with a fresh memory. A batch that is dropped publishes nothing. The same batch under the same
idempotency key is followed once, also when the process died before it could answer.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe.adaptation.stream import Stream, StreamSpec, StreamState
from moe.errors import NotFoundError, SpecError
from serve.delta import Delta
from serve.http.backend import StreamAnswer
from serve.planning import Plan
from serve.requests import AdaptReport, AdaptRequest

if TYPE_CHECKING:
    from serve.adapting import Adapter
    from serve.once import Claim
    from serve.records import StateRecord

_MOST = 64


@dataclass
class _Running:
    """A stream of this process."""

    stream: Stream
    settings: Mapping[str, Any]
    version: int | None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Streams:
    """All streams of one adapter.

    Args:
        adapter: computes and publishes.
        spec: resets, patience and window; the guard's limits are the adapter's.
        most: streams that are remembered; the one that was silent longest is forgotten first.
    """

    def __init__(self, adapter: Adapter, spec: StreamSpec | None = None, most: int = _MOST) -> None:
        self._adapter = adapter
        self._spec = (spec or StreamSpec()).model_copy(update={"guard": adapter.guard})
        self._most = most
        self._running: OrderedDict[tuple[str, str], _Running] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, request: AdaptRequest) -> StreamAnswer:
        """Take the next batch of the stream ``request.name``.

        Raises:
            SpecError: a dry run was asked for; also this and all others as :meth:`serve.adapting.Adapter.adapt`.
        """
        plan = self._adapter.plan(request)
        if request.dry_run:
            raise SpecError("A stream has no dry run.", "Adapt once with dry_run, or follow under another name.")
        self._adapter.turns.reserve()
        try:
            key = request.idempotency_key
            if key is None:
                return self._next(plan, None)
            with self._adapter.once.claim(request.tenant, f"stream {key}", plan.fingerprint) as claim:
                if claim.report is not None:
                    return _answer(claim.report)
                answer = self._next(plan, claim)
                claim.finish(_plain(answer))
                return answer
        finally:
            self._adapter.turns.release()

    def _next(self, plan: Plan, claim: Claim | None) -> StreamAnswer:
        running = self._take(plan)
        with running.lock:
            if claim is not None and claim.since is not None:
                record = self._published(plan.request, claim)
                if record is not None:
                    return self._take_up(plan, record)
            if claim is not None:
                claim.note(version=running.version)
            return self._follow(plan, running)

    def _published(self, request: AdaptRequest, claim: Claim) -> StateRecord | None:
        """What an attempt that died has published under the same key, if it had come so far."""
        try:
            record = self._adapter.catalogue.get(request.tenant, request.name)
        except NotFoundError:
            return None
        since = claim.since or 0.0
        moved = "version" in claim.noted and record.version != claim.noted["version"] and record.created >= since - 1
        return record if moved and record.method == request.method else None

    def _take_up(self, plan: Plan, record: StateRecord) -> StreamAnswer:
        """The answer that the dead attempt owed: the predictions of the state it published."""
        adapter, request = self._adapter, plan.request
        with adapter.turns.turn():
            delta = adapter.catalogue.resident(request.tenant, request.name, record.version)
            images = adapter.model.preprocess(request.images)
            logits_SK = adapter.model.predict(images, [delta] * len(images))
        report = AdaptReport(
            name=record.name,
            method=record.method,
            support=record.support,
            steps=0,  # how many the attempt took died with it
            loss_before=record.loss_before,
            loss_after=record.loss_after,
            expert_weights=record.expert_weights,
            collapse=record.collapse,
            seconds=record.seconds,
            record=record,
            bytes=record.bytes,
        )
        return StreamAnswer(logits_SK.float().cpu().numpy(), report)

    def _take(self, plan: Plan) -> _Running:
        """The stream as it goes on: in memory if it still is what the catalogue holds, else from the catalogue."""
        request, key = plan.request, (plan.request.tenant, plan.request.name)
        try:
            current: int | None = self._adapter.catalogue.get(*key).version
        except NotFoundError:
            current = None
        with self._lock:
            found = self._running.get(key)
            if found is not None and found.settings == self._settings(plan) and found.version == current:
                self._running.move_to_end(key)
                return found
        kept: Mapping[str, Tensor] = {}
        if current is not None:
            device = self._adapter.model.device
            delta = self._adapter.catalogue.resident(request.tenant, request.name, current)
            kept = {name: value.to(device) for name, value in delta.tensors.items()}
        aggregator = self._adapter.model.aggregator
        stream = Stream(
            self._adapter.model.base, plan.method, self._spec, aggregator, current or 0, StreamState(delta=kept)
        )
        with self._lock:
            fresh = self._running[key] = _Running(stream, self._settings(plan), current)
            self._running.move_to_end(key)
            while len(self._running) > self._most:
                self._running.popitem(last=False)
        return fresh

    @staticmethod
    def _settings(plan: Plan) -> Mapping[str, Any]:
        return {"method": plan.request.method, **plan.options}

    def _follow(self, plan: Plan, running: _Running) -> StreamAnswer:
        adapter, request = self._adapter, plan.request
        with adapter.turns.turn():
            begin = time.perf_counter()
            images = adapter.model.preprocess(request.images).to(adapter.model.device)
            tokens = adapter.support.tokens(plan.images_digest, images) if plan.method.needs_teacher else None
            with adapter.private_base() as base, torch.inference_mode(False), torch.enable_grad():
                running.stream.model = base
                step = running.stream.observe(images, tokens)
        result = step.result
        report = AdaptReport(
            name=request.name,
            method=request.method,
            support=len(request.images),
            steps=0 if result is None else result.steps,
            loss_before=None if result is None else result.loss_before,
            loss_after=None if result is None else result.loss_after,
            expert_weights=() if result is None else result.expert_weights or (),
            collapse={**step.check.as_dict(), "reset": step.reset},
            seconds=time.perf_counter() - begin,
            facts={**({} if result is None else result.facts), "batches": step.number, "moved": float(step.moved)},
        )
        if step.moved:
            delta = Delta.changed(adapter.model.state_dict(), running.stream.state.delta)
            record = adapter.publish(plan, delta, replace(report, bytes=delta.nbytes))
            report = replace(report, bytes=delta.nbytes, record=record)
            running.version = record.version
        return StreamAnswer(step.logits_SK.detach().float().cpu().numpy(), report)


def _plain(answer: StreamAnswer) -> dict[str, Any]:
    """As JSON. Inverse: :func:`_answer`."""
    raw = np.ascontiguousarray(answer.logits_BK, dtype="<f4")
    logits = {"shape": list(raw.shape), "base64": base64.b64encode(raw.tobytes()).decode("ascii")}
    return {"logits": logits, "report": answer.report.to_json()}


def _answer(plain: Mapping[str, Any]) -> StreamAnswer:
    raw = np.frombuffer(base64.b64decode(plain["logits"]["base64"]), dtype="<f4")
    return StreamAnswer(raw.reshape(plain["logits"]["shape"]), AdaptReport.from_json(plain["report"]))
