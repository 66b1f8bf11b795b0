"""Requests and the workers that answer them: nothing is lost to a worker's fault, and nobody
waits for nothing.
"""

import asyncio
import time

import pytest

from eopd import pool as module
from eopd.pool import NoAnswerError, Pool
from eopd.roles import WorkerDownError

TIMEOUT_S = 0.1

# a worker that is waited for without end is what some of these tests are about
pytestmark = [pytest.mark.timeout(60), pytest.mark.virtual_time]


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(module, "PING_S", 0.05)


class Worker:
    """Answers with its name after ``delay_s``; "down" or "hung" for good, or "deaf": it
    answers pings alone.
    """

    def __init__(
        self, name: str, mood: str = "well", delay_s: float = 0.0, ping_s: float = 0.0
    ) -> None:
        self.name = name
        self.mood = mood
        self.delay_s = delay_s
        self.ping_s = ping_s
        self.asked: list[object] = []
        self.in_flight = self.most = self.pings = 0

    async def work(self, request: object = None) -> str:
        self.asked.append(request)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)

        try:
            await asyncio.sleep(self.delay_s if self.mood in ("well", "down") else 3600)
        finally:
            self.in_flight -= 1

        if self.mood == "down":
            raise WorkerDownError("its engine died")

        return self.name

    async def ping(self) -> None:
        self.pings += 1
        await asyncio.sleep(3600 if self.mood == "hung" else self.ping_s)


def pool_of(
    *workers: Worker, seats: int = 100, timeout_s: float = TIMEOUT_S
) -> tuple[Pool[Worker], list]:
    pool = Pool("worker", timeout_s=timeout_s, ping=lambda worker: worker.ping())
    lost = []
    pool.on_loss = lambda number, reason: lost.append((number, reason))
    for number, worker in enumerate(workers):
        pool.add(number, worker, seats)

    return pool, lost


async def ask(pool: Pool[Worker], request: object = None, priority: int = 0) -> str:
    return await pool.run(lambda worker: worker.work(request), priority)


async def test_the_worker_with_the_most_free_seats_is_asked():
    workers = [Worker(name, delay_s=0.02) for name in "abc"]
    pool, _ = pool_of(*workers)
    await asyncio.gather(*(ask(pool) for _ in range(9)))
    assert (
        [len(worker.asked) for worker in workers]
        == [worker.most for worker in workers]
        == [3, 3, 3]
    )
    assert pool.in_flight == {0: 0, 1: 0, 2: 0}


async def test_a_worker_has_seats_and_the_rest_goes_by_priority():
    worker = Worker("a", delay_s=0.005)
    pool, _ = pool_of(worker, seats=2)
    requests = [
        asyncio.create_task(
            ask(
                pool,
                number,
                priority=-number,
            )
        )
        for number in range(8)
    ]
    await asyncio.sleep(0.001)
    assert pool.status() == [
        "worker 0: 2 of 2 in flight, the oldest for 0 s",
        "worker: 6 wait for one",
    ]
    await asyncio.gather(*requests)
    assert worker.most == 2
    assert worker.asked == [0, 1, 7, 6, 5, 4, 3, 2]


async def test_time_in_the_queue_is_nobodys_failure():
    """Twice as much waits as the worker answers within the deadline."""
    worker = Worker("a", delay_s=0.02)
    pool, lost = pool_of(worker, seats=1, timeout_s=1.0)
    answers = await asyncio.gather(*(ask(pool) for _ in range(100)))
    assert answers == ["a"] * 100
    assert lost == []
    assert pool.num_failures == worker.pings == 0


async def test_the_loss_of_a_worker_is_not_that_of_the_next_one_with_its_number():
    pool, _ = pool_of(Worker("old", "down"))
    lost = []

    def replace(number: int, reason: str) -> None:
        lost.append(reason)
        pool.add(number, Worker("new"), 100)

    pool.on_loss = replace
    answers = await asyncio.gather(*(ask(pool) for _ in range(3)))
    assert answers == ["new"] * 3
    assert lost == ["its engine died"]


async def test_a_dead_worker_costs_no_request_and_is_told_once():
    dead = [Worker(name, "down", delay_s=0.001) for name in "abcdefgh"]
    pool, lost = pool_of(*dead, seats=2)
    requests = [asyncio.create_task(ask(pool)) for _ in range(16)]
    await asyncio.sleep(0.05)
    assert sorted(number for number, _ in lost) == list(range(8))
    assert pool.num_up == 0
    assert not any(request.done() for request in requests)
    pool.add(3, Worker("new"), 100)
    assert await asyncio.gather(*requests) == ["new"] * 16
    assert pool.num_failures == 16


async def test_a_request_of_a_lost_worker_keeps_its_place():
    dead = Worker("dead", "down", delay_s=0.01)
    well = Worker("well", delay_s=0.03)
    pool, _ = pool_of(dead, well, seats=1)
    requests = [asyncio.create_task(ask(pool, number)) for number in range(5)]
    await asyncio.gather(*requests)
    assert dead.asked == [0]
    assert well.asked == [1, 0, 2, 3, 4]


async def test_a_worker_that_misses_a_deadline_and_a_ping_is_lost():
    hung = Worker("hung", "hung")
    well = Worker("well", delay_s=0.01)
    pool, lost = pool_of(hung, well)
    clock = asyncio.get_running_loop()
    started = clock.time()
    assert await asyncio.gather(*(ask(pool) for _ in range(6))) == ["well"] * 6
    assert clock.time() - started < 1.0
    assert lost == [(0, "no answer within 0.1 s, nor to a ping within 0.05 s")]
    assert (hung.pings, hung.in_flight) == (1, 0)


async def test_a_request_that_is_not_answered_has_failed():
    deaf, other = Worker("deaf", "deaf"), Worker("other")
    pool, lost = pool_of(deaf, other)
    outcomes = await asyncio.gather(*(ask(pool) for _ in range(4)), return_exceptions=True)
    failed = [str(outcome) for outcome in outcomes if isinstance(outcome, NoAnswerError)]
    assert failed == ["no answer of worker 0 within 0.1 s"] * 2
    assert lost == []
    assert pool.num_up == 2
    assert deaf.pings in (1, 2) and pool.num_failures == 2  # one for all that are late at a time


async def test_a_ping_that_nobody_waited_for_vouches_for_no_worker_later(monkeypatch):
    monkeypatch.setattr(module, "PING_S", 0.5)
    slow, well = Worker("slow", "deaf", ping_s=0.2), Worker("well")
    pool, lost = pool_of(slow)
    asked = asyncio.create_task(ask(pool))
    while not slow.pings:
        await asyncio.sleep(0.01)

    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await asyncio.sleep(0.3)  # the ping is answered
    slow.mood = "hung"
    asked = asyncio.create_task(ask(pool))
    while not slow.in_flight:
        await asyncio.sleep(0.01)

    pool.add(1, well, 100)
    assert await asked == "well"
    assert (slow.pings, [number for number, _ in lost]) == (2, [0])


async def test_a_worker_that_is_found_lost_gives_back_what_it_holds():
    slow = Worker("slow", delay_s=30.0)
    well = Worker("well", delay_s=0.001)
    pool, lost = pool_of(slow, well, timeout_s=3600.0)
    requests = [asyncio.create_task(ask(pool)) for _ in range(2)]
    await asyncio.sleep(0.01)
    pool.lose(0, "its weights are wrong")
    pool.lose(0, "again")
    assert await asyncio.wait_for(asyncio.gather(*requests), 1.0) == ["well", "well"]
    assert lost == [(0, "its weights are wrong")]
    assert slow.in_flight == 0


async def test_a_late_failure_is_not_put_down_to_the_next_worker():
    first = Worker("first", "down", delay_s=0.02)
    pool, lost = pool_of(first)
    request = asyncio.create_task(ask(pool))
    await asyncio.sleep(0.01)
    pool.lose(0, "its node is gone")
    pool.add(0, Worker("second"), 1)
    assert await request == "second"
    await asyncio.sleep(0.03)
    assert len(lost) == 1 and pool.num_up == 1


async def test_a_mistake_in_the_code_is_loud():
    pool, lost = pool_of(Worker("a"))

    async def broken(worker):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await pool.run(broken)

    assert lost == [] and pool.in_flight == {0: 0}


async def test_a_cancelled_request_leaves_its_seat_and_its_place():
    worker = Worker("a", delay_s=0.02)
    pool, _ = pool_of(worker, seats=1)
    held, waits, last = (asyncio.create_task(ask(pool, number)) for number in range(3))
    await asyncio.sleep(0.005)
    held.cancel()
    waits.cancel()
    assert await last == "a"
    assert worker.asked == [0, 2]
    assert pool.in_flight == {0: 0}


async def test_a_request_cancelled_in_the_moment_it_gets_a_seat_leaves_it():
    worker = Worker("a")
    pool, _ = pool_of(seats=1)
    request = asyncio.create_task(ask(pool, "cancelled"))
    await asyncio.sleep(0)
    pool.add(0, worker, 1)
    request.cancel()
    assert await asyncio.wait_for(ask(pool, "next"), 1.0) == "a"
    assert worker.asked == ["next"]


async def test_a_request_cancelled_in_the_moment_the_pool_fails_is_cancelled():
    pool, _ = pool_of()
    request = asyncio.create_task(ask(pool))
    await asyncio.sleep(0)
    pool.fail(RuntimeError("nobody is left"))
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_when_nobody_comes_any_more_all_who_wait_are_told():
    pool, _ = pool_of()
    waiting = asyncio.create_task(ask(pool))
    await asyncio.sleep(0)
    pool.fail(RuntimeError("nobody is left"))
    for request in (waiting, ask(pool)):
        with pytest.raises(RuntimeError, match="nobody is left"):
            await request


async def test_a_worker_that_drains_ends_what_it_has_and_gets_no_more():
    a = Worker("a", delay_s=0.05)
    b = Worker("b", delay_s=0.05)
    pool, lost = pool_of(a, b)
    requests = [asyncio.create_task(ask(pool)) for _ in range(2)]
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(pool.drain(1))
    await asyncio.sleep(0.01)
    assert pool.status()[1] == "worker 1: 1 of 100 in flight, the oldest for 0 s, takes no more"
    assert pool.num_up == 1
    assert 1 not in pool
    assert not draining.done()
    assert await asyncio.gather(*requests, *(ask(pool) for _ in range(3))) == [
        "a",
        "b",
        "a",
        "a",
        "a",
    ]
    await draining
    assert pool.in_flight == {0: 0} and lost == []


async def test_a_worker_that_hangs_while_it_drains_is_let_go():
    pool, _ = pool_of(Worker("a"), Worker("b", "hung"), timeout_s=3600.0)
    pool._members[0].draining = True
    request = asyncio.create_task(ask(pool))
    await asyncio.sleep(0.01)
    pool._members[0].draining = False
    draining = asyncio.create_task(pool.drain(1))
    await asyncio.sleep(0.01)
    pool.lose(1, "it does not answer")
    await asyncio.wait_for(draining, 2.0)
    assert await request == "a"


async def test_requests_that_wait_cost_nothing():
    """With a poll ten times a second, 4,096 of them took 40 % of a core."""
    pool, _ = pool_of()
    waiting = [asyncio.create_task(ask(pool)) for _ in range(4096)]
    await asyncio.sleep(0)
    cpu = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - cpu < 0.05
    for request in waiting:
        request.cancel()

    await asyncio.gather(*waiting, return_exceptions=True)
