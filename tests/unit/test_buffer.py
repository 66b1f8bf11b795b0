"""Staleness is bounded by construction: a state machine drives the buffer through every order
of events.
"""

import asyncio
import itertools

import fakes
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eopd.buffer import Buffer, Part
from eopd.ledger import Watermark
from eopd.types import LostReason, Stored


def stored(issue: int, version: int) -> Stored:
    return Stored(fakes.header(str(issue), oldest=version), body=None)


TOKENS = stored(0, 0).header.num_tokens
CHOICES = st.lists(st.integers(0, 1_000), min_size=1, max_size=6)


class Driving(RuleBasedStateMachine):
    """Everything that can happen to a buffer, in any order, beside an oracle that sorts and
    searches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    @initialize(
        batch=st.integers(1, 4),
        max_staleness=st.integers(0, 3),
        lookahead=st.integers(0, 3),
        period=st.integers(2, 12),
        part=st.sampled_from([None, 1, 2, 3]),
    )
    def start(
        self, batch: int, max_staleness: int, lookahead: int, period: int, part: int | None
    ) -> None:
        self.settled = Watermark()
        self.dropped = set[int]()
        self.mode = {
            "batch": batch,
            "max_staleness": max_staleness,
            "lookahead": min(lookahead, max_staleness),
            "part_tokens": part and part * TOKENS,
        }
        self.buffer = self.new_buffer()
        self.period = period
        self.version = self.next_issue = self.crashes = 0  # the version that the learner holds
        self.served = 0
        self.accidents: set[int] = set()  # may be turned away
        self.running: dict[int, int] = {}  # issue -> version that writes it
        # scored, and no fate yet
        self.offers: dict[int, tuple[int, asyncio.Task[LostReason | None]]] = {}
        self.trained: list[int] = []
        self.unpublished: set[int] = set()  # of those, what engines have no weights of
        self.taking: asyncio.Task[Part | None] | None = None
        self.part: Part | None = None  # the last one taken, which the learner has
        self.taken: list[int] = []  # of this batch
        self.is_whole = False

    def new_buffer(self) -> Buffer:
        return Buffer(**self.mode, settled=self.settled, dropped=self.dropped)

    def due(self) -> set[int]:
        """What the batch of this version may leave behind none of: the first so many that are
        not dropped.
        """
        count = self.buffer.batch * (self.version + 1 - self.buffer.lookahead)
        numbers = (number for number in itertools.count() if number not in self.dropped)
        return set(itertools.islice(numbers, max(0, count)))

    def next_batch(self) -> set[int]:
        """Those that no batch but the next one can be made of."""
        numbers = (number for number in itertools.count() if number not in self.settled)
        return set(itertools.islice(numbers, self.buffer.batch))

    def settle(self) -> None:
        """Let everything go on that can; then look at what became of offers and of the
        learner's wait.
        """
        self.loop.run_until_complete(_turns(4))
        if self.taking and self.taking.done():
            self.part, self.taking = self.taking.result(), None
            self.is_whole = self.part.completes
            assert not (self.is_whole and self.unpublished)
            issues = list(self.part.taken)
            versions = [one.header.oldest_version for one in self.part.taken.values()]
            assert issues == sorted(issues) and not {*issues} & {*self.taken}
            assert self.version - min(versions) <= self.buffer.max_staleness
            self.taken += issues
            assert list(self.buffer.taken) == sorted(self.taken)
            if self.is_whole:
                assert len(self.taken) == self.buffer.batch
                assert self.due() <= {*self.trained, *self.taken}
            else:
                assert {*issues} <= self.next_batch()
                assert len(issues) * TOKENS >= self.buffer.part_tokens

        for issue, (_, offer) in list(self.offers.items()):
            if offer.done():
                del self.offers[issue]
                if offer.result() is None:
                    assert issue in self.trained
                    continue

                assert offer.result() is LostReason.TOO_STALE
                assert issue in self.accidents, "turned away although admission bounds staleness"
                self.accidents.remove(issue)
                self.running[issue] = self.served  # it keeps its slot and is sampled again

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

        if self.is_whole:
            self.step()

        if not self.taking:
            self.take()

    @rule(most=st.integers(1, 16))
    def admit(self, most: int) -> None:
        for _ in range(min(most, self.buffer.num_slots - self.buffer.num_slots_held)):
            self.loop.run_until_complete(self.buffer.admit())
            self.issue()

    def issue(self) -> None:
        while self.next_issue in self.settled:
            self.next_issue += 1

        self.running[self.next_issue] = self.served
        self.next_issue += 1

    @property
    def quick(self) -> list[int]:
        """What is being written, but for the slow ones, which take until nothing else can go
        on: the worst case.
        """
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
        offer = self.buffer.offer(issue, stored(issue, version))
        self.offers[issue] = (version, self.loop.create_task(offer))
        self.settle()

    @precondition(lambda self: self.quick)
    @rule(choice=st.integers(0, 1_000))
    def lose(self, choice: int) -> None:
        issue = self.quick[choice % len(self.quick)]
        self.running[issue] = self.served

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(0, 1_000))
    def drop(self, choice: int) -> None:
        """A trajectory is given up, and the next one takes its slot."""
        issue = sorted(self.running)[choice % len(self.running)]
        del self.running[issue]
        self.settled.add(issue)
        self.dropped.add(issue)
        self.buffer.skip(issue)
        self.issue()
        self.settle()

    @precondition(lambda self: self.taking is None and not self.is_whole)
    @rule()
    def take(self) -> None:
        self.part = None
        take = self.buffer.take(self.version, ahead=bool(self.unpublished))
        self.taking = self.loop.create_task(take)
        self.settle()

    @precondition(lambda self: self.is_whole)
    @rule()
    def step(self) -> None:
        for issue in self.taken:
            self.settled.add(issue)

        self.trained += sorted(self.taken)
        self.unpublished = {*self.taken}
        self.taken, self.part, self.is_whole = [], None, False
        self.buffer.settle()
        self.version += 1
        self.settle()

    @precondition(lambda self: self.unpublished)
    @rule()
    def publish(self) -> None:
        self.unpublished = set()
        self.buffer.release()
        if self.taking:
            assert self.loop.run_until_complete(self.taking) is None
            self.taking = None

        self.served = self.version
        self.settle()

    @precondition(lambda self: self.part)
    @rule(choices=CHOICES)
    def lose_bodies(self, choices: list[int]) -> None:
        """The part is not trained: some of it is sampled again, the rest waits again."""
        issues = list(self.part.taken)
        lost = {issues[choice % len(issues)] for choice in choices}
        self.buffer.put_back(self.part, lost)
        self.taken = [issue for issue in self.taken if issue not in issues]
        self.part, self.is_whole = None, False
        self.loop.run_until_complete(_turns(4))

        for issue in lost:
            _, offer = self.offers.pop(issue)
            assert offer.result() is LostReason.BODY_LOST
            self.running[issue] = self.served

    @precondition(lambda self: self.crashes < 2)
    @rule()
    def crash_and_resume(self) -> None:
        self.teardown(close=False)
        self.buffer = self.new_buffer()
        self.crashes += 1
        self.running = {}
        self.offers = {}
        self.taking = self.part = None
        self.taken, self.is_whole = [], False
        self.served, self.unpublished = self.version, set()
        self.accidents = set()
        self.next_issue = self.settled.floor

    @invariant()
    def slots_bound_everything(self) -> None:
        held = len(self.running) + len(self.offers)
        assert self.buffer.num_slots_held == held <= self.buffer.num_slots
        assert self.buffer.num_ready == len(self.offers) - len(self.taken) - len(self.unpublished)
        assert self.buffer.num_in_flight == len(self.running)
        ahead = self.settled.ahead - self.dropped
        assert len(ahead) <= self.buffer.batch * self.buffer.lookahead

    @invariant()
    def nothing_is_trained_twice_and_order_is_kept(self) -> None:
        assert len(self.trained) == self.buffer.batch * self.version
        assert len(self.trained) == len(set(self.trained))
        assert not self.dropped & set(self.trained)
        if self.buffer.lookahead == 0:
            assert self.trained == sorted(self.trained)
            kept = (number for number in itertools.count() if number not in self.dropped)
            assert self.trained == list(itertools.islice(kept, len(self.trained)))

    @invariant()
    def the_learner_waits_only_while_no_batch_is_full_and_one_can_be(self) -> None:
        if self.taking is None:
            return

        oldest_allowed = self.version - self.buffer.max_staleness
        offered = self.offers.keys() - self.unpublished
        assert all(self.offers[issue][0] >= oldest_allowed for issue in offered)
        batch = sorted(offered)[: self.buffer.batch]
        due = self.due() - set(self.trained)
        assert self.unpublished or len(batch) < self.buffer.batch or not due <= set(batch), (
            f"{batch} is a batch that nobody takes"
        )
        if self.buffer.part_tokens is not None:
            ready = offered & self.next_batch() - {*self.taken}
            is_last = len(ready) + len(self.taken) == self.buffer.batch
            count = len(ready) - (1 if self.unpublished and is_last else 0)
            assert count * TOKENS < self.buffer.part_tokens, f"{ready} is a part nobody takes"

        is_free = self.buffer.num_slots_held < self.buffer.num_slots
        can_go_on = self.running or self.unpublished or is_free
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


def train(buffer: Buffer, *issues: int) -> None:
    for issue in issues:
        buffer.settled.add(issue)

    buffer.settle()
    buffer.release()


def offer(buffer: Buffer, issue: int, *, version: int) -> asyncio.Task[LostReason | None]:
    return asyncio.create_task(buffer.offer(issue, stored(issue, version)))


async def take(buffer: Buffer, *, version: int) -> list[int]:
    """The numbers of a part of a batch."""
    part = await buffer.take(version)
    return list(part.taken)


async def test_synchronous_means_no_admission_before_the_release():
    buffer = Buffer(batch=2, max_staleness=0, lookahead=0)
    await buffer.admit()
    await buffer.admit()
    third = asyncio.create_task(buffer.admit())
    offers = [offer(buffer, i, version=0) for i in (1, 0)]
    assert await take(buffer, version=0) == [0, 1]
    await asyncio.sleep(0)
    assert not third.done()
    buffer.settle()
    buffer.release()
    await third
    assert await asyncio.gather(*offers) == [None, None]


async def test_a_trajectory_too_stale_by_accident_keeps_its_slot():
    buffer = Buffer(batch=1, max_staleness=1, lookahead=0)
    await buffer.admit()
    offer = asyncio.create_task(buffer.offer(0, stored(0, version=3)))
    taking = asyncio.create_task(buffer.take(version=5))
    assert await offer is LostReason.TOO_STALE
    assert buffer.num_slots_held == 1 and not taking.done()
    again = asyncio.create_task(buffer.offer(0, stored(0, version=5)))
    assert list((await taking).taken) == [0]
    buffer.settle()
    buffer.release()
    assert await again is None


async def test_one_that_is_turned_away_while_it_waits_is_overdue_again():
    buffer = Buffer(batch=1, max_staleness=1, lookahead=0)
    for _ in range(2):
        await buffer.admit()

    offers = [offer(buffer, i, version=-i) for i in (0, 1)]
    assert await take(buffer, version=0) == [0]
    train(buffer, 0)
    await buffer.admit()
    taking = asyncio.create_task(take(buffer, version=1))
    assert await asyncio.gather(*offers) == [None, LostReason.TOO_STALE]
    later = offer(buffer, 2, version=1)
    await asyncio.sleep(0.01)
    assert not taking.done()
    again = offer(buffer, 1, version=1)
    assert await taking == [1]
    train(buffer, 1)
    assert await again is None
    later.cancel()


async def test_lookahead_lets_a_slow_trajectory_be_overtaken_once():
    buffer = Buffer(batch=1, max_staleness=2, lookahead=1)
    for _ in range(2):
        await buffer.admit()

    fast = offer(buffer, 1, version=0)
    assert await take(buffer, version=0) == [1]
    train(buffer, 1)
    await buffer.admit()
    faster = offer(buffer, 2, version=1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.take(1), 0.01)  # 0 is due now

    slow = offer(buffer, 0, version=0)
    assert await take(buffer, version=1) == [0]
    train(buffer, 0)
    assert await asyncio.gather(fast, slow) == [None, None]
    faster.cancel()


async def test_a_batch_of_another_size_leaves_nothing_overdue():
    buffer = Buffer(batch=8, max_staleness=1, lookahead=0, settled=Watermark(10))
    offers = [offer(buffer, issue, version=0) for issue in (*range(10, 16), 17, 18)]
    taking = asyncio.create_task(take(buffer, version=0))
    await _turns(4)
    assert not taking.done(), "number 16 would be left behind"
    offers.append(offer(buffer, 16, version=0))
    assert await taking == list(range(10, 18))
    for waiting in offers:
        waiting.cancel()


async def test_a_batch_with_lost_bodies_is_taken_again():
    buffer = Buffer(batch=2, max_staleness=0, lookahead=0)
    offers = [offer(buffer, issue, version=0) for issue in (0, 1)]
    part = await buffer.take(version=0)
    assert part.completes and len(part.taken) == 2
    buffer.put_back(part, {1})
    assert await offers[1] is LostReason.BODY_LOST
    assert not offers[0].done()
    taking = asyncio.create_task(take(buffer, version=0))
    await _turns(4)
    assert not taking.done() and buffer.next_missing == 1
    again = offer(buffer, 1, version=0)
    assert await taking == [0, 1]
    train(buffer, 0, 1)
    assert await asyncio.gather(offers[0], again) == [None, None]


async def test_a_number_that_is_dropped_later_holds_up_no_batch_before_it():
    buffer = Buffer(batch=2, max_staleness=1, lookahead=0)
    offers = [offer(buffer, issue, version=0) for issue in (0, 1)]
    buffer.settled.add(3)
    buffer.skip(3)
    assert await asyncio.wait_for(take(buffer, version=0), 1.0) == [0, 1]
    train(buffer, 0, 1)
    offers += [offer(buffer, issue, version=0) for issue in (2, 4)]
    assert await asyncio.wait_for(take(buffer, version=1), 1.0) == [2, 4]
    train(buffer, 2, 4)
    await asyncio.gather(*offers)


async def test_a_batch_begins_with_what_no_other_batch_can_have():
    buffer = Buffer(batch=4, max_staleness=1, lookahead=0, part_tokens=2 * TOKENS)
    offers = [
        offer(
            buffer,
            issue,
            version=0,
        )
        for issue in (5, 4, 6)
    ]  # of the second batch
    taking = asyncio.create_task(buffer.take(version=0))
    await _turns(4)
    assert not taking.done()

    offers += [offer(buffer, issue, version=0) for issue in (3, 1)]
    part = await asyncio.wait_for(taking, 1.0)
    assert list(part.taken) == [1, 3] and not part.completes
    assert buffer.num_ready == 3

    buffer.settled.add(0)  # dropped: 4 takes its place
    buffer.skip(0)
    offers.append(offer(buffer, 2, version=0))
    part = await asyncio.wait_for(buffer.take(version=0), 1.0)
    assert list(part.taken) == [2, 4] and part.completes
    train(buffer, 1, 2, 3, 4)
    assert await asyncio.gather(offers[1], *offers[3:]) == [None] * 4

    part = await asyncio.wait_for(buffer.take(version=1), 1.0)
    assert list(part.taken) == [5, 6] and not part.completes
    for waiting in offers:
        waiting.cancel()


async def test_a_part_has_no_small_remainder():
    buffer = Buffer(batch=9, max_staleness=0, lookahead=0, part_tokens=2 * TOKENS + 1)
    offers = [offer(buffer, issue, version=0) for issue in range(8)]
    await _turns(2)
    assert await take(buffer, version=0) == list(range(6))  # three parts of two and a bit each
    assert buffer.num_ready == 2
    for waiting in offers:
        waiting.cancel()


@pytest.mark.parametrize(
    ("mode", "ahead"),
    [
        ({"lookahead": 0, "max_staleness": 4}, range(12, 16)),  # was 1
        ({"lookahead": 1, "max_staleness": 3}, range(8, 16)),  # with batches of 8
    ],
)
async def test_a_run_that_goes_on_in_another_mode_has_no_empty_part(mode, ahead):
    settled = Watermark(0, {*ahead})
    buffer = Buffer(batch=4, part_tokens=2 * TOKENS, settled=settled, **mode)
    offers, parts = [], []
    for issues in (range(2), range(2, 4)):
        offers += [offer(buffer, issue, version=0) for issue in issues]
        await _turns(2)
        parts.append(await asyncio.wait_for(buffer.take(version=0), 1.0))

    taken = [list(part.taken) for part in parts]
    assert taken == [[0, 1], [2, 3]]
    assert [part.completes for part in parts] == [False, True]
    for waiting in offers:
        waiting.cancel()
