"""Prometheus metrics of one process, with names that stay. States appear by name only where nobody else could see them.

With several tenants a state's name is a secret of its owner, so the label ``domain`` then says only ``state`` or
``base``; with one tenant it is the name, for the first hundred names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from serve.batching import BatchFacts

CONTENT_TYPE = CONTENT_TYPE_LATEST
_MAX_DOMAINS = 100
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FILL = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_METHODS = ("GET", "POST", "DELETE")


class Metrics:
    """The counters of one application.

    Args:
        name_domains: use the states' names as label values.
    """

    def __init__(self, name_domains: bool) -> None:
        self.registry = CollectorRegistry()
        self._names: set[str] | None = set() if name_domains else None
        own = self.registry
        self.requests = Counter("moepipe_requests", "Answers.", ["method", "route", "status"], registry=own)
        self.latency = Histogram(
            "moepipe_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=own
        )
        self.rows = Counter("moepipe_infer_rows", "Images predicted.", ["domain"], registry=own)
        self.batch_rows = Histogram("moepipe_batch_rows", "Images in a forward pass.", buckets=_ROWS, registry=own)
        self.batch_fill = Histogram(
            "moepipe_batch_fill", "Rows / limit of a forward pass.", buckets=_FILL, registry=own
        )
        self.batch_wait = Histogram(
            "moepipe_batch_wait_seconds", "Wait of a request for its forward pass.", buckets=_SECONDS, registry=own
        )
        self.batch_domains = Histogram(
            "moepipe_batch_domains", "Domains in a forward pass.", buckets=_ROWS, registry=own
        )
        self.compute = Histogram("moepipe_compute_seconds", "Time of a forward pass.", buckets=_SECONDS, registry=own)
        self.adapt = Histogram(
            "moepipe_adapt_seconds", "Time of an adaptation.", ["method"], buckets=_SECONDS, registry=own
        )
        self.collapses = Counter("moepipe_collapse_rollbacks", "Adaptations undone by the guard.", registry=own)

    def on_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answer; ``route`` is the template, not the address."""
        self.requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def on_rows(self, state: str | None, rows: int) -> None:
        """Images that were predicted by ``state`` (None: the base)."""
        self.rows.labels(self._domain(state)).inc(rows)

    def on_batch(self, facts: BatchFacts) -> None:
        """One forward pass."""
        self.batch_rows.observe(facts.rows)
        self.batch_fill.observe(facts.fill)
        self.batch_domains.observe(facts.domains)
        self.compute.observe(facts.seconds)
        for wait in facts.waits:
            self.batch_wait.observe(wait)

    def on_adapt(self, method: str, seconds: float, collapsed: bool) -> None:
        """One adaptation that came to an end."""
        self.adapt.labels(method).observe(seconds)
        if collapsed:
            self.collapses.inc()

    def render(self, gauges: Mapping[str, float]) -> bytes:
        """The text that Prometheus reads.

        Args:
            gauges: present values by name, such as bytes of resident states.
        """
        now = CollectorRegistry()
        for name, value in gauges.items():
            Gauge(name, name.removeprefix("moepipe_").replace("_", " ").capitalize() + ".", registry=now).set(value)
        return generate_latest(self.registry) + generate_latest(now)

    def _domain(self, state: str | None) -> str:
        if state is None:
            return "base"
        if self._names is None:
            return "state"
        if state not in self._names and len(self._names) >= _MAX_DOMAINS:
            return "other"
        self._names.add(state)
        return state
