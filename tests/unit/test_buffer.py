"""Staleness is bounded by construction: a state machine drives the buffer through every order of events."""

import asyncio

import fakes
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eopd.buffer import Buffer, Taken
from eopd.types import Stored


def stored(issue: int, version: int) -> Stored:
    return Stored(fakes.header(str(issue), oldest=version), body=None)


CHOICES = st.lists(st.integers(0, 1_000), min_size=1, max_size=6)


class Driving(RuleBasedStateMachine):
    """Everything that can happen to a buffer, in any order, beside an oracle that sorts and searches."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    @initialize(
        batch=st.integers(1, 4),
        max_staleness=st.integers(0, 3),
        lookahead=st.integers(0, 3),
        period=st.integers(2, 12),
    )
    def start(self, batch: int, max_staleness: int, lookahead: int, period: int) -> None:
        self.buffer = Buffer(batch=batch, max_staleness=max_staleness, lookahead=min(lookahead, max_staleness))
        self.period = period
        self.version = self.next_issue = self.crashes = 0
        self.accidents: set[int] = set()  # may be turned away
        self.running: dict[int, int] = {}  # issue -> version that writes it
        self.offers: dict[int, tuple[int, asyncio.Task[bool]]] = {}  # scored, and no fate yet
        self.consumed: list[int] = []
        self.taking: asyncio.Task[list[Taken]] | None = None
        self.unpublished: list[Taken] = []

    def settle(self) -> None:
        """Let everything go on that can; then look at what became of offers and of the learner's wait."""
        self.loop.run_until_complete(_turns(4))
        if self.taking and self.taking.done():
            self.unpublished, self.taking = self.taking.result(), None
            self.consumed += [taken.issue for taken in self.unpublished]
            staleness = [self.version - taken.stored.header.oldest_version for taken in self.unpublished]
            assert len(staleness) == self.buffer.batch and max(staleness) <= self.buffer.max_staleness
            overdue = range(self.buffer.batch * (self.version + 1 - self.buffer.lookahead))
            assert set(overdue) <= set(self.consumed)
        for issue, (_, offer) in list(self.offers.items()):
            if offer.done():
                del self.offers[issue]
                assert offer.result() == (issue in self.consumed)
                if not offer.result():
                    assert issue in self.accidents, "turned away although admission bounds staleness"
                    self.accidents.remove(issue)
                    self.running[issue] = self.version  # it keeps its slot and is sampled again

    @rule(most=st.integers(1, 16), choices=CHOICES)
    def go_on(self, most: int, choices: list[int]) -> None:
        """One round of all that is usual, so that most examples get far."""
        self.admit(most)
        self.finish(choices)
        if self.taking and self.running and not self.quick:
            slow = min(self.running)
            self.offer(slow, self.running.pop(slow))
        if self.unpublished:
            self.publish()
        if not self.taking and not self.unpublished:
            self.take()

    @rule(most=st.integers(1, 16))
    def admit(self, most: int) -> None:
        for _ in range(min(most, self.buffer.num_slots - self.buffer.num_in_flight)):
            self.loop.run_until_complete(self.buffer.admit())
            while self.next_issue in self.consumed:
                self.next_issue += 1
            self.running[self.next_issue] = self.version
            self.next_issue += 1

    @property
    def quick(self) -> list[int]:
        """What is being written, but for the slow ones, which take until nothing else can go on: the worst case."""
        return sorted(issue for issue in self.running if issue % self.period)

    @rule(choices=CHOICES)
    def finish(self, choices: list[int]) -> None:
        for choice in choices[: len(self.quick)]:
            issue = self.quick[choice % len(self.quick)]
            self.offer(issue, self.running.pop(issue))

    @precondition(lambda self: self.quick)
    @rule(choice=st.integers(0, 1_000), beyond=st.integers(0, 2))
    def finish_under_old_weights_by_accident(self, choice: int, beyond: int) -> None:
        issue = self.quick[choice % len(self.quick)]
        del self.running[issue]
        self.accidents.add(issue)
        self.offer(issue, self.version - self.buffer.max_staleness - beyond)

    def offer(self, issue: int, version: int) -> None:
        self.offers[issue] = version, self.loop.create_task(self.buffer.offer(issue, stored(issue, version)))
        self.settle()

    @precondition(lambda self: self.quick)
    @rule(choice=st.integers(0, 1_000))
    def lose(self, choice: int) -> None:
        issue = self.quick[choice % len(self.quick)]
        self.running[issue] = self.version

    @precondition(lambda self: self.taking is None and not self.unpublished)
    @rule()
    def take(self) -> None:
        self.taking = self.loop.create_task(self.buffer.take(self.version))
        self.settle()

    @precondition(lambda self: self.unpublished)
    @rule()
    def publish(self) -> None:
        self.loop.run_until_complete(self.buffer.release(len(self.unpublished)))
        self.unpublished = []
        self.version += 1

    @precondition(lambda self: self.crashes < 2 and not self.unpublished)
    @rule()
    def crash_and_resume(self) -> None:
        self.teardown(close=False)
        self.buffer = Buffer(
            batch=self.buffer.batch,
            max_staleness=self.buffer.max_staleness,
            lookahead=self.buffer.lookahead,
            next_unconsumed=self.buffer.next_unconsumed,
            consumed_ahead=set(self.buffer.consumed_ahead),
        )
        self.crashes += 1
        self.running, self.offers, self.taking, self.accidents = {}, {}, None, set()
        self.next_issue = self.buffer.next_unconsumed

    @invariant()
    def slots_bound_everything(self) -> None:
        held = len(self.running) + len(self.offers) + len(self.unpublished)
        assert self.buffer.num_in_flight == held <= self.buffer.num_slots
        assert self.buffer.num_ready == len(self.offers)
        assert len(self.buffer.consumed_ahead) <= self.buffer.batch * self.buffer.lookahead

    @invariant()
    def nothing_is_consumed_twice_and_order_is_kept(self) -> None:
        assert (
            len(set(self.consumed)) == len(self.consumed) == self.buffer.batch * (self.version + bool(self.unpublished))
        )
        if self.buffer.lookahead == 0:
            assert self.consumed == list(range(len(self.consumed)))

    @invariant()
    def the_learner_waits_only_while_no_batch_is_full_and_one_can_be(self) -> None:
        if self.taking is None:
            return
        oldest_allowed = self.version - self.buffer.max_staleness
        assert all(version >= oldest_allowed for version, _ in self.offers.values())
        batch = sorted(self.offers)[: self.buffer.batch]
        due = set(range(self.buffer.batch * (self.version + 1 - self.buffer.lookahead))) - set(self.consumed)
        assert len(batch) < self.buffer.batch or not due <= set(batch), f"{batch} is a batch that nobody takes"
        can_go_on = self.running or self.buffer.num_in_flight < self.buffer.num_slots
        assert can_go_on, "every slot is taken and nothing can be consumed: deadlock"

    def teardown(self, close: bool = True) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(_turns(2))
        if close:
            self.loop.close()


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class TestAnyOrderOfEvents(Driving.TestCase):
    settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


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


async def test_one_that_is_turned_away_while_it_waits_is_overdue_again():
    buffer = Buffer(batch=1, max_staleness=1, lookahead=0)
    for _ in range(2):
        await buffer.admit()
    offers = [asyncio.create_task(buffer.offer(i, stored(i, version=-i))) for i in (0, 1)]
    assert [t.issue for t in await buffer.take(version=0)] == [0]
    await buffer.release(1)
    await buffer.admit()
    taking = asyncio.create_task(buffer.take(version=1))
    assert await asyncio.gather(*offers) == [True, False]
    later = asyncio.create_task(buffer.offer(2, stored(2, version=1)))
    await asyncio.sleep(0.01)
    assert not taking.done()
    again = asyncio.create_task(buffer.offer(1, stored(1, version=1)))
    assert [t.issue for t in await taking] == [1]
    assert await again
    later.cancel()


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


async def test_a_batch_of_another_size_leaves_nothing_behind_that_is_overdue():
    buffer = Buffer(batch=8, max_staleness=1, lookahead=0, next_unconsumed=10)
    offers = [asyncio.create_task(buffer.offer(issue, stored(issue, 0))) for issue in (*range(10, 16), 17, 18)]
    taking = asyncio.create_task(buffer.take(version=0))
    await _turns(4)
    assert not taking.done(), "number 16 would be left behind"
    offers.append(asyncio.create_task(buffer.offer(16, stored(16, 0))))
    assert [taken.issue for taken in await taking] == list(range(10, 18))
    for offer in offers:
        offer.cancel()
