"""The backend of one process: model, catalogue, batcher and adapter together; no Ray.

Predictions run in the batcher's thread; adaptations wait and run in threads of their own, so that neither blocks the
event loop. What an adaptation publishes is served from the next request on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from serve.batching import Batcher, BatchFacts, BatchLimits
from serve.http.backend import Answer, StreamAnswer, Work
from serve.known_data import KnownData

if TYPE_CHECKING:
    from serve.adapting import Adapter, AdaptReport, AdaptRequest
    from serve.catalogue import Catalogue
    from serve.delta import Delta
    from serve.info import ServedInfo
    from serve.jobs import JobStatus
    from serve.model import ServedModel

T = TypeVar("T")


class LocalBackend:
    """See :class:`serve.http.backend.Backend`.

    Args:
        model: what is served.
        catalogue: its states.
        batch: limits of a forward pass and of the queue.
        adapter: makes states; made from model and catalogue, when first needed, when left out.
        data: folder of the data sets that clients may name.
        adapt_queue: adaptations that may wait in this process.
        max_images: of one adaptation, and of one data set.
        max_steps: of one adaptation.
    """

    def __init__(
        self,
        model: ServedModel,
        catalogue: Catalogue,
        batch: BatchLimits | None = None,
        adapter: Adapter | None = None,
        data: Path | None = None,
        adapt_queue: int = 32,
        max_images: int = 4096,
        max_steps: int = 1000,
    ) -> None:
        self.model = model
        self.states = catalogue
        self._adapter = adapter
        self._queue, self._max_images, self._max_steps = adapt_queue, max_images, max_steps
        self._data = KnownData(data, max_images)
        # Besides those that wait: the few that compute, and one that is refused.
        self._threads = ThreadPoolExecutor(adapt_queue + 5, thread_name_prefix="moepipe-adapt")
        self._on_batch: Callable[[BatchFacts], None] | None = None
        self._on_rows: Callable[[str | None, int], None] | None = None
        self._batcher = Batcher(self._compute, batch, self._observed)
        model.predict(
            torch.zeros(1, model.info.channels, *model.info.image_size)
        )  # the first pass is slow: not for a client

    @property
    def info(self) -> ServedInfo:
        """What is served."""
        return self.model.info

    @property
    def catalogue(self) -> Catalogue:
        """The domain states."""
        return self.states

    @property
    def adapter(self) -> Adapter:
        """Makes states."""
        if self._adapter is None:
            from serve.adapting import Adapter

            self._adapter = Adapter(
                self.model, self.states, queue=self._queue, max_images=self._max_images, max_steps=self._max_steps
            )
        return self._adapter

    def check_room(self, work: Work) -> None:
        """See :meth:`serve.http.backend.Backend.check_room`."""
        if work == "predict":
            self._batcher.check_room()
        else:
            self.adapter.turns.check()

    async def ready(self) -> bool:
        """The model was loaded and warmed before this object existed."""
        return True

    async def preprocess(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """See :meth:`serve.http.backend.Backend.preprocess`."""
        return await asyncio.to_thread(self.model.preprocess, images)

    async def infer(
        self, images_BCHW: torch.Tensor, tenant: str, state: str | None = None, version: int | None = None
    ) -> Answer:
        """See :meth:`serve.http.backend.Backend.infer`."""
        record = delta = None
        if state is not None:
            record, delta = await asyncio.to_thread(self._resolve, tenant, state, version)
        logits = await self._batcher.submit(images_BCHW, [delta] * images_BCHW.shape[0])
        if self._on_rows is not None:
            self._on_rows(state, images_BCHW.shape[0])
        return Answer(logits.numpy(), record)

    async def adapt(self, request: AdaptRequest) -> AdaptReport:
        """See :meth:`serve.http.backend.Backend.adapt`."""
        return await self._aside(self.adapter.adapt, request)

    async def start(self, request: AdaptRequest) -> str:
        """See :meth:`serve.http.backend.Backend.start`."""
        return await self._aside(self.adapter.start, request)

    async def job(self, tenant: str, job: str) -> JobStatus:
        """See :meth:`serve.http.backend.Backend.job`."""
        return self.adapter.job(job, tenant)

    async def stream(self, request: AdaptRequest) -> StreamAnswer:
        """See :meth:`serve.http.backend.Backend.stream`."""
        return await self._aside(self.adapter.stream, request)

    async def dataset(self, uri: str) -> list[NDArray[Any]]:
        """See :meth:`serve.http.backend.Backend.dataset`."""
        return await asyncio.to_thread(self._data.read, uri)

    def gauges(self) -> Mapping[str, float]:
        """Resident states, their bytes, evictions, and what waits."""
        cache = self.states.resident_stats()
        return {
            "moepipe_domain_states_resident": cache.entries,
            "moepipe_resident_bytes": cache.bytes,
            "moepipe_pinned_bytes": cache.pinned_bytes,
            "moepipe_evictions": cache.evictions,
            "moepipe_queue_rows": self._batcher.waiting_rows,
            "moepipe_queue_bytes": self._batcher.waiting_bytes,
        }

    def observe(self, on_batch: Callable[[BatchFacts], None], on_rows: Callable[[str | None, int], None]) -> None:
        """See :meth:`serve.http.backend.Backend.observe`."""
        self._on_batch, self._on_rows = on_batch, on_rows

    async def close(self) -> None:
        """See :meth:`serve.http.backend.Backend.close`."""
        await self._batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _resolve(self, tenant: str, state: str, version: int | None) -> tuple[Any, Delta]:
        record = self.states.get(tenant, state, version)
        return record, self.states.load(record)

    def _compute(self, images_BCHW: torch.Tensor, states: Sequence[Delta | None]) -> torch.Tensor:
        return self.model.predict(images_BCHW, states).cpu()

    def _observed(self, facts: BatchFacts) -> None:
        if self._on_batch is not None:
            self._on_batch(facts)

    async def _aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run in the threads of adaptations: waiting ones must not use up those that predictions need."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
