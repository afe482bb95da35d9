"""The dynamic batcher: requests of any domains that wait together run as one forward pass.

Limits are in rows and bytes of images, not in requests. With the default wait of zero nobody waits for company: while a
batch computes the next one gathers, which costs a lone client nothing and fills batches under load. The queue is
bounded in rows and bytes, so the wait of an accepted request is bounded too; what does not fit is refused at once with
the time after which it may come again.

Shapes: B rows of a request or batch, C channels, H and W pixels, K outputs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve.http.problems import Refused

if TYPE_CHECKING:
    from serve.delta import Delta

Compute = Callable[[Tensor, "Sequence[Delta | None]"], Tensor]
_RATE_MEMORY = 0.8  # share of the old estimate that stays when a batch ends
_MAX_RETRY = 30.0


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of a batch and of the queue.

    Attributes:
        rows: most images in one forward pass.
        nbytes: most bytes of images in one forward pass (a single image always fits).
        wait: seconds that the first of a batch waits for company; 0 takes what is there.
        queue_rows: images that may wait, besides those that compute.
        queue_bytes: bytes of images that may wait.
        longest: seconds that a request may have to wait by the speed of the latest batches; where it would be more, it
            is refused at once.
        timeout: seconds after which a request that still waits is given up.
    """

    rows: int = 32
    nbytes: int = 256 << 20
    wait: float = 0.0
    queue_rows: int = 1024
    queue_bytes: int = 1 << 30
    longest: float = 4.0
    timeout: float = 30.0


@dataclass(frozen=True)
class BatchFacts:
    """One batch after it ran: for metrics.

    Attributes:
        rows: images in it.
        fill: rows / limit.
        requests: pieces of requests in it.
        domains: different domain states in it; the base counts as one.
        waits: seconds that each piece waited.
        seconds: time of the forward pass.
    """

    rows: int
    fill: float
    requests: int
    domains: int
    waits: tuple[float, ...]
    seconds: float


@dataclass
class _Piece:
    """Rows of one request that go into one batch."""

    images_BCHW: Tensor
    states: tuple[Delta | None, ...]
    future: asyncio.Future[Tensor]
    arrived: float

    @property
    def rows(self) -> int:
        return self.images_BCHW.shape[0]

    @property
    def nbytes(self) -> int:
        return self.images_BCHW.numel() * self.images_BCHW.element_size()

    @property
    def kind(self) -> tuple[object, ...]:
        return (tuple(self.images_BCHW.shape[1:]), self.images_BCHW.dtype)


class Batcher:
    """Gathers requests of one event loop and runs them in one thread.

    Args:
        compute: ``(images [B, C, H, W], one delta or None per row) -> [B, K]``; rows must not influence each other.
        limits: bounds.
        observe: called after every batch.
    """

    def __init__(
        self, compute: Compute, limits: BatchLimits | None = None, observe: Callable[[BatchFacts], None] | None = None
    ) -> None:
        self.compute = compute
        self.limits = limits or BatchLimits()
        self.observe = observe
        self.waiting_rows = 0
        self.waiting_bytes = 0
        self._queue: deque[_Piece] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moepipe-infer")
        self._pump: asyncio.Task[None] | None = None
        self._arrival = asyncio.Event()
        self._rows_per_second = 0.0
        self._computing = 0
        self._closed = False

    async def submit(self, images_BCHW: Tensor, states: Sequence[Delta | None]) -> Tensor:
        """Rows of one request; waits for their outputs.

        Args:
            images_BCHW: at least one row.
            states: the delta of each row, None for the base. They are held until the rows are computed, so that a state
                deleted in the meantime still serves the requests that came before.

        Returns:
            ``[B, K]``, as if the rows had been computed alone.

        Raises:
            Refused: 429 when the queue is full, 503 when the wait was too long or the server stops.
            ValueError: no rows, or not one delta per row.
        """
        rows = images_BCHW.shape[0]
        if rows == 0 or rows != len(states):
            raise ValueError(f"{rows} rows with {len(states)} states cannot be a request.")
        if self._closed:
            raise Refused(503, "stopping", "The server is stopping.", "Try again in a moment.", retry_after=2)
        self.check_room(rows, images_BCHW.numel() * images_BCHW.element_size())
        loop, now = asyncio.get_running_loop(), time.monotonic()
        pieces = [
            _Piece(images, tuple(states[start : start + len(images)]), loop.create_future(), now)
            for start, images in self._split(images_BCHW)
        ]
        for piece in pieces:
            self._queue.append(piece)
            self.waiting_rows += piece.rows
            self.waiting_bytes += piece.nbytes
        self._arrival.set()
        if not self._pumping(loop):
            self._pump = loop.create_task(self._run())
        try:
            outputs = await asyncio.gather(*(piece.future for piece in pieces))
        except BaseException:
            for piece in pieces:
                piece.future.cancel()  # the client is gone, or another piece failed: nobody wants the rest
            raise
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    async def close(self) -> None:
        """Refuse what waits, let the batch that computes finish, and end the thread."""
        self._closed = True
        while self._queue:
            self._refuse(self._leave(), "stopping", "The server is stopping.")
        if self._pump is not None and self._pumping(asyncio.get_running_loop()):
            await asyncio.wait([self._pump])
        self._thread.shutdown(wait=False)

    def _pumping(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether batches are being taken in ``loop``; one that was left behind in an ended loop does not count."""
        return self._pump is not None and not self._pump.done() and self._pump.get_loop() is loop

    @property
    def expected_wait(self) -> float:
        """Seconds until a request that comes now would have its turn; 0 while the speed is not known."""
        return (self._computing + self.waiting_rows) / self._rows_per_second if self._rows_per_second else 0.0

    def check_room(self, rows: int = 1, nbytes: int = 0) -> None:
        """Raises Refused (429) when the queue is full or too long; an empty queue takes any request."""
        limits, wait = self.limits, self.expected_wait
        fits = self.waiting_rows + rows <= limits.queue_rows and self.waiting_bytes + nbytes <= limits.queue_bytes
        if self._queue and not (fits and wait <= limits.longest):
            raise Refused(
                429,
                "overloaded",
                f"{self.waiting_rows} images wait already; {rows} more do not fit.",
                "Try again after the time that Retry-After names.",
                retry_after=min(max(wait, 1.0), _MAX_RETRY),
            )

    def _split(self, images_BCHW: Tensor) -> list[tuple[int, Tensor]]:
        """``(first row, rows)`` of pieces that each fit a batch."""
        row_bytes = max(1, images_BCHW[0].numel() * images_BCHW.element_size())
        most = max(1, min(self.limits.rows, self.limits.nbytes // row_bytes))
        return [(start, images_BCHW[start : start + most]) for start in range(0, images_BCHW.shape[0], most)]

    async def _run(self) -> None:
        """Batch after batch until nothing waits."""
        while self._queue:
            if self.limits.wait > 0:
                await self._gather()
            batch = self._take()
            if batch:
                await self._compute(batch)

    async def _gather(self) -> None:
        """Wait until a batch is full or its first piece has waited long enough."""
        until = self._queue[0].arrived + self.limits.wait
        while self._queue and self.waiting_rows < self.limits.rows and (left := until - time.monotonic()) > 0:
            self._arrival.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Piece]:
        """The longest waiting pieces of one image shape that fit together; empty when all of them were given up."""
        batch: list[_Piece] = []
        rows = nbytes = 0
        now = time.monotonic()
        while self._queue:
            head = self._queue[0]
            if head.future.done():
                self._leave()
                continue
            if now - head.arrived > self.limits.timeout:
                self._refuse(self._leave(), "overloaded", f"No turn came within {self.limits.timeout:g} s.")
                continue
            full = rows + head.rows > self.limits.rows or nbytes + head.nbytes > self.limits.nbytes
            if batch and (full or head.kind != batch[0].kind):
                break
            batch.append(self._leave())
            rows, nbytes = rows + head.rows, nbytes + head.nbytes
        return batch

    def _leave(self) -> _Piece:
        piece = self._queue.popleft()
        self.waiting_rows -= piece.rows
        self.waiting_bytes -= piece.nbytes
        return piece

    @staticmethod
    def _refuse(piece: _Piece, reason: str, message: str) -> None:
        if not piece.future.done():
            piece.future.set_exception(Refused(503, reason, message, "Try again later.", retry_after=2))

    async def _compute(self, batch: list[_Piece]) -> None:
        images = batch[0].images_BCHW if len(batch) == 1 else torch.cat([piece.images_BCHW for piece in batch])
        states = [state for piece in batch for state in piece.states]
        started = time.monotonic()
        self._computing = len(states)
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self.compute, images, states)
        except Exception as error:  # whatever the model raises belongs to the request that caused it
            if len(batch) == 1:
                if not batch[0].future.done():
                    batch[0].future.set_exception(error)
                return
            for piece in batch:  # one by one, so that neighbours of the culprit are served
                await self._compute([piece])
            return
        finally:
            self._computing = 0
        seconds = time.monotonic() - started
        rate = len(states) / max(seconds, 1e-6)
        self._rows_per_second = rate + _RATE_MEMORY * (self._rows_per_second - rate) if self._rows_per_second else rate
        for piece, output in zip(batch, torch.split(outputs, [piece.rows for piece in batch]), strict=True):
            if not piece.future.done():
                piece.future.set_result(output)
        if self.observe is not None:
            waits = tuple(started - piece.arrived for piece in batch)
            domains = len({id(state) for state in states})
            fill = len(states) / self.limits.rows
            self.observe(BatchFacts(len(states), fill, len(batch), domains, waits, seconds))
