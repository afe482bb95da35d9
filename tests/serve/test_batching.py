"""The batcher: fills batches, keeps rows apart, bounds its queue, and survives failing neighbours."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batching import Batcher, BatchFacts, BatchLimits
from serve.delta import Delta
from serve.http.problems import Refused


def sums(images, states):
    """Row sums, plus what the row's own state adds."""
    added = [0.0 if state is None else float(state.tensors["a"]) for state in states]
    return images.flatten(1).sum(1, keepdim=True) + torch.tensor(added).unsqueeze(1)


def rows(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


class Gate:
    """A computation that waits until it is let go."""

    def __init__(self):
        self.open, self.begun, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, images, states):
        self.begun.set()
        assert self.open.wait(60)
        self.batches.append(images.shape[0])
        return sums(images, states)


async def held(gate, batcher):
    """One request that computes, so that the next ones wait."""
    first = asyncio.create_task(batcher.submit(rows(100), [None]))
    assert await asyncio.to_thread(gate.begun.wait, 60)
    return first


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    limit=st.integers(1, 7),
    nbytes=st.integers(1, 40),
    wait=st.sampled_from([0.0, 0.002]),
)
def test_every_row_gets_its_own_answer_whatever_the_batches(sizes, limit, nbytes, wait):
    states = [Delta({"a": torch.tensor(1000.0 * number)}) if number % 3 else None for number in range(len(sizes))]
    seen: list[BatchFacts] = []

    async def main():
        batcher = Batcher(sums, BatchLimits(rows=limit, nbytes=nbytes, wait=wait), seen.append)
        requests = [rows(*range(number, number + size)) for number, size in enumerate(sizes)]
        answers = await asyncio.gather(*(batcher.submit(r, [states[n]] * len(r)) for n, r in enumerate(requests)))
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            assert torch.equal(answer, sums(request, [states[number]] * len(request)))
        assert (batcher.waiting_rows, batcher.waiting_bytes) == (0, 0)
        await batcher.close()

    asyncio.run(main())
    assert sum(facts.rows for facts in seen) == sum(sizes)
    assert all(facts.rows <= limit and (facts.rows * 4 <= nbytes or facts.rows == 1) for facts in seen)


def test_requests_that_wait_together_share_a_mixed_batch():
    gate, seen = Gate(), []

    async def main():
        batcher = Batcher(gate, BatchLimits(rows=8), seen.append)
        first = await held(gate, batcher)
        state = Delta({"a": torch.tensor(5.0)})
        rest = [
            asyncio.create_task(batcher.submit(rows(value), [state if value == 2 else None])) for value in (1, 2, 3)
        ]
        await asyncio.sleep(0.01)
        gate.open.set()
        answers = [float(answer) for answer in await asyncio.gather(first, *rest)]
        assert answers == [100, 1, 7, 3]
        await batcher.close()

    asyncio.run(main())
    assert gate.batches == [1, 3]
    assert (seen[1].requests, seen[1].domains, seen[1].fill) == (3, 2, 3 / 8)
    assert all(wait > 0 for wait in seen[1].waits)


def test_a_full_queue_refuses_at_once_and_the_accepted_are_served():
    gate = Gate()

    async def main():
        batcher = Batcher(gate, BatchLimits(rows=4, queue_rows=3))
        first = await held(gate, batcher)
        accepted = [asyncio.create_task(batcher.submit(rows(value), [None])) for value in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Refused) as caught:
            await batcher.submit(rows(9), [None])
        assert (caught.value.status, caught.value.reason) == (429, "overloaded")
        assert caught.value.retry_after >= 1
        gate.open.set()
        assert [float(answer) for answer in await asyncio.gather(first, *accepted)] == [100, 0, 1, 2]
        assert float(await batcher.submit(rows(9), [None])) == 9  # there is room again
        await batcher.close()

    asyncio.run(main())


def test_a_queue_that_is_long_by_the_present_speed_refuses_too():
    gate = Gate()

    async def main():
        batcher = Batcher(gate, BatchLimits(rows=4, queue_rows=100, longest=0.5))
        batcher._rows_per_second = 2.0
        first = await held(gate, batcher)
        accepted = asyncio.create_task(batcher.submit(rows(0), [None]))
        await asyncio.sleep(0.01)
        assert batcher.expected_wait == 1.0
        with pytest.raises(Refused) as caught:
            await batcher.submit(rows(9), [None])
        assert caught.value.status == 429
        gate.open.set()
        assert [float(answer) for answer in await asyncio.gather(first, accepted)] == [100, 0]
        assert batcher.expected_wait == 0
        await batcher.close()

    asyncio.run(main())


def test_a_failing_request_does_not_hurt_its_neighbours():
    def fragile(images, states):
        if (images < 0).any():
            raise RuntimeError("negative")
        return sums(images, states)

    async def main():
        batcher = Batcher(fragile, BatchLimits(rows=8, wait=0.02))
        values = [rows(1), rows(-1), rows(3)]
        answers = await asyncio.gather(*(batcher.submit(v, [None]) for v in values), return_exceptions=True)
        assert [float(answers[0]), float(answers[2])] == [1, 3]
        assert isinstance(answers[1], RuntimeError)
        await batcher.close()

    asyncio.run(main())


def test_a_cancelled_request_leaves_the_queue_without_being_computed():
    gate = Gate()

    async def main():
        batcher = Batcher(gate, BatchLimits(rows=1))
        first = await held(gate, batcher)
        gone = asyncio.create_task(batcher.submit(rows(5), [None]))
        stays = asyncio.create_task(batcher.submit(rows(6), [None]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert [float(answer) for answer in await asyncio.gather(first, stays)] == [100, 6]
        assert batcher.waiting_rows == 0
        await batcher.close()

    asyncio.run(main())
    assert gate.batches == [1, 1]


def test_who_waits_too_long_is_told_to_come_back():
    gate = Gate()

    async def main():
        batcher = Batcher(gate, BatchLimits(rows=1))
        first = await held(gate, batcher)
        batcher.limits = BatchLimits(rows=1, timeout=0.02)  # the first must not be late, however slow its start
        late = asyncio.create_task(batcher.submit(rows(5), [None]))
        await asyncio.sleep(0.05)
        gate.open.set()
        assert float(await first) == 100
        with pytest.raises(Refused) as caught:
            await late
        assert (caught.value.status, caught.value.reason) == (503, "overloaded")
        await batcher.close()

    asyncio.run(main())


def test_closing_refuses_what_waits_and_finishes_what_computes():
    gate = Gate()

    async def main():
        batcher = Batcher(gate, BatchLimits(rows=1))
        first = await held(gate, batcher)
        waits = asyncio.create_task(batcher.submit(rows(5), [None]))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        gate.open.set()
        await closing
        assert float(await first) == 100
        with pytest.raises(Refused):
            await waits
        with pytest.raises(Refused):
            await batcher.submit(rows(1), [None])

    asyncio.run(main())


def test_images_of_different_sizes_never_meet_in_a_batch():
    async def main():
        batcher = Batcher(sums, BatchLimits(rows=8, wait=0.01))
        small, large = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
        answers = await asyncio.gather(*(batcher.submit(x, [None]) for x in (small, large, small)))
        assert [float(answer) for answer in answers] == [4, 9, 4]
        await batcher.close()

    asyncio.run(main())


def test_a_batcher_outlives_the_loop_it_was_used_in():
    batcher = Batcher(sums)
    for value in (3, 4):
        assert float(asyncio.run(batcher.submit(rows(value), [None]))) == value
    asyncio.run(asyncio.wait_for(batcher.close(), 60))
