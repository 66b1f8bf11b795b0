"""Staleness is bounded by construction: a state machine drives the buffer through every order of events."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopd.buffer import Buffer
from eopd.types import Header, StopReason, Stored, TrajectoryKey


def stored(issue: int, version: int) -> Stored:
    header = Header(
        key=TrajectoryKey(0, str(issue), 0),
        source="test",
        num_prompt_tokens=1,
        num_response_tokens=1,
        num_loss_tokens=1,
        stop_reason=StopReason.LENGTH,
        oldest_version=version,
        newest_version=version,
        response_crc32=0,
        sums={},
    )
    return Stored(header, body=None)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    lookahead=st.integers(0, 3),
    choices=st.lists(st.integers(0, 1_000), min_size=40, max_size=120),
)
def test_no_order_of_events_breaks_the_bound_or_deadlocks(batch, max_staleness, lookahead, choices):
    lookahead = min(lookahead, max_staleness)
    worst = asyncio.run(_drive(batch, max_staleness, lookahead, choices))
    assert worst <= max_staleness


async def _drive(batch: int, max_staleness: int, lookahead: int, choices: list[int]) -> int:
    """Play a random schedule: which running trajectory finishes next is drawn; the learner takes whenever it can."""
    buffer = Buffer(batch=batch, max_staleness=max_staleness, lookahead=lookahead)
    running: dict[int, int] = {}  # issue -> version at admission
    version = issue = worst = 0
    consumed: list[int] = []
    offers: list[asyncio.Task[bool]] = []
    for choice in choices:
        while buffer.num_in_flight < buffer.num_slots:
            await buffer.admit()
            running[issue] = version
            issue += 1
        assert running, "every slot is taken and nothing can be consumed: deadlock"
        finished = sorted(running)[choice % len(running)]
        offers.append(asyncio.create_task(buffer.offer(finished, stored(finished, running.pop(finished)))))
        taking = asyncio.create_task(buffer.take(version))
        for _ in range(4):
            await asyncio.sleep(0)
        if not taking.done():
            taking.cancel()
            continue
        taken = taking.result()
        assert len(taken) == batch
        consumed += [t.issue for t in taken]
        worst = max(worst, *(version - t.stored.header.oldest_version for t in taken))
        version += 1
        await buffer.release(batch)
    assert len(consumed) == len(set(consumed))
    if lookahead == 0:
        assert consumed == list(range(len(consumed)))
    for offer in offers:
        offer.cancel()
    return worst


async def test_synchronous_means_no_admission_before_the_release():
    buffer = Buffer(batch=2, max_staleness=0, lookahead=0)
    await buffer.admit()
    await buffer.admit()
    third = asyncio.create_task(buffer.admit())
    offers = [asyncio.create_task(buffer.offer(i, stored(i, 0))) for i in (1, 0)]
    assert [t.issue for t in await buffer.take(version=0)] == [0, 1]
    await asyncio.sleep(0)
    assert not third.done()
    await buffer.release(2)
    await third
    assert await asyncio.gather(*offers) == [True, True]


async def test_a_trajectory_that_is_too_stale_by_accident_is_turned_away_and_keeps_its_slot():
    buffer = Buffer(batch=1, max_staleness=1, lookahead=0)
    await buffer.admit()
    offer = asyncio.create_task(buffer.offer(0, stored(0, version=3)))
    taking = asyncio.create_task(buffer.take(version=5))
    assert await offer is False
    assert buffer.num_in_flight == 1 and not taking.done()
    again = asyncio.create_task(buffer.offer(0, stored(0, version=5)))
    assert [t.issue for t in await taking] == [0]
    assert await again


async def test_lookahead_lets_a_slow_trajectory_be_overtaken_once_and_no_more():
    buffer = Buffer(batch=1, max_staleness=2, lookahead=1)
    for _ in range(2):
        await buffer.admit()
    fast = asyncio.create_task(buffer.offer(1, stored(1, 0)))
    assert [t.issue for t in await buffer.take(0)] == [1]
    await buffer.release(1)
    await buffer.admit()
    faster = asyncio.create_task(buffer.offer(2, stored(2, 1)))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.take(1), 0.01)  # 0 is due now
    slow = asyncio.create_task(buffer.offer(0, stored(0, 0)))
    assert [t.issue for t in await buffer.take(1)] == [0]
    assert await fast and await slow
    faster.cancel()
