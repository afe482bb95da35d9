"""What the HTTP surface needs from whatever computes: implemented by ``serve.local`` in one process and by Ray Serve.

Predictions and catalogue reads happen in the process that decoded the request; adaptations may go elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from serve.adapting import AdaptReport, AdaptRequest, JobStatus
    from serve.batching import BatchFacts
    from serve.catalogue import Catalogue
    from serve.info import ServedInfo
    from serve.records import StateRecord

Work = Literal["predict", "adapt"]


@dataclass(frozen=True)
class Answer:
    """Predictions of one request.

    Attributes:
        logits_BK: float32, one row an image.
        state: the domain state that served it, None for the base model.
    """

    logits_BK: NDArray[np.float32]
    state: StateRecord | None


@dataclass(frozen=True)
class StreamAnswer:
    """Predictions for the next images of a stream by the state that followed them, and the report of that step."""

    logits_BK: NDArray[np.float32]
    report: AdaptReport


class Backend(Protocol):
    """The computing side of one served model."""

    @property
    def info(self) -> ServedInfo:
        """What is served."""
        ...

    @property
    def catalogue(self) -> Catalogue:
        """The domain states; its calls read and write small files and run in a thread."""
        ...

    def check_room(self, work: Work) -> None:
        """Asked before the body of a request is read. Raises Refused (429) when there is no place for more ``work``."""
        ...

    async def ready(self) -> bool:
        """The base is loaded and warm."""
        ...

    async def preprocess(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """``[B, C, H, W]`` from uint8 images ``[H, W, C]``, off the event loop."""
        ...

    async def infer(
        self, images_BCHW: Tensor, tenant: str, state: str | None = None, version: int | None = None
    ) -> Answer:
        """Logits by the base (``state`` None) or by a state of ``tenant``.

        Raises:
            NotFoundError: this tenant has no such state.
            Refused: 429 or 503 when the queue is full or the wait was too long.
        """
        ...

    async def adapt(self, request: AdaptRequest) -> AdaptReport:
        """Adapt and wait for the report. Raises Refused (429) when too many wait."""
        ...

    async def start(self, request: AdaptRequest) -> str:
        """Begin an adaptation; returns the id of its job. Raises Refused (429) when too many wait."""
        ...

    async def job(self, tenant: str, job: str) -> JobStatus:
        """How far a job of ``tenant`` is. Raises NotFoundError, also for other tenants' jobs."""
        ...

    async def stream(self, request: AdaptRequest) -> StreamAnswer:
        """Let the state follow the next images of a stream, and predict them with what it became."""
        ...

    async def dataset(self, uri: str) -> list[NDArray[np.uint8]]:
        """Images of a data set that the server knows. Raises NotFoundError, DataError."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Present values by metric name, such as bytes of resident states."""
        ...

    def observe(self, on_batch: Callable[[BatchFacts], None], on_rows: Callable[[str | None, int], None]) -> None:
        """Call ``on_batch`` after every forward pass, and ``on_rows`` (state or None, rows) after every request."""
        ...

    async def close(self) -> None:
        """Stop: refuse what waits, finish what computes."""
        ...
