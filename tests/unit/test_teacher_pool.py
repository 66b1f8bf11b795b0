"""Teachers that answer, hang, die and come back, on fakes: no trajectory is lost to a replica's fault."""

import asyncio

import fakes
import pytest

from eopd import replicas as module
from eopd.roles import TeacherDownError, WorkerDownError
from eopd.teacher.pool import TeacherPool, TeacherRouter
from eopd.telemetry.rows import series
from eopd.types import LossReason, LostTrajectory, Stored, TrajectoryKey

TIMEOUT_S = 0.25

pytestmark = pytest.mark.timeout(60)  # a replica that is waited for without end is what some of these tests are about


def stored(index: int = 0, source: str = "s") -> Stored:
    return Stored(fakes.header(str(index), source=source, num_response=5), None)


class Fake:
    """Answers by ``mood``: well, slowly (never), down, or "bad": this trajectory cannot be scored."""

    def __init__(self, name: str, mood: str = "well", delay_s: float = 0.0) -> None:
        self.name, self.mood, self.delay_s = name, mood, delay_s
        self.asked = self.in_flight = self.most = 0

    async def score(self, one):
        self.asked += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(3600 if self.mood == "slow" else self.delay_s)
        finally:
            self.in_flight -= 1
        if self.mood == "down":
            raise TeacherDownError("its engine died")
        if self.mood == "bad":
            return LostTrajectory(key=one.header.key, reason=LossReason.TEACHER_FAILED, detail=f"bad on {self.name}")
        return Stored(one.header, self.name)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(module, "_OPEN_S", 0.1)
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    monkeypatch.setattr(module, "_PAUSES_S", (0.0, 0.01, 0.01))


def pool_of(*fakes: Fake, spare: list | None = None, max_attempts: int = 3, name: str = "t") -> TeacherPool:
    """``spare`` are the replacements, in turn: a fake, or an exception that keeps it from starting."""
    spares = spare or []

    async def replace(index: int, reason: str) -> Fake:
        found = spares.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return TeacherPool(name, fakes, replace=replace, timeout_s=TIMEOUT_S, max_attempts=max_attempts)


def metric(pool, name):
    return pool.metrics()[series(f"eopd_teacher_{name}", teacher="t")]


async def test_the_least_loaded_replica_is_asked():
    fakes = [Fake("a", delay_s=0.02), Fake("b", delay_s=0.02), Fake("c", delay_s=0.02)]
    pool = pool_of(*fakes)
    await asyncio.gather(*(pool.score(stored(i)) for i in range(9)))
    assert [fake.asked for fake in fakes] == [fake.most for fake in fakes] == [3, 3, 3]
    assert metric(pool, "tokens_total") == 45.0
    assert metric(pool, "in_flight_trajectories") == 0.0


async def test_a_dead_replica_costs_no_trajectory_and_is_replaced():
    dead, new, unused = Fake("dead", "down"), Fake("new"), Fake("unused")
    spare = [OSError("no memory"), new, unused]
    pool = pool_of(dead, spare=spare)
    results = await asyncio.gather(*(pool.score(stored(i)) for i in range(5)))
    assert [result.body for result in results] == ["new"] * 5
    assert dead.asked == 5 and spare == [unused]  # all were in flight when it died; one replacement, not five
    assert metric(pool, "replacements_total") == 1.0 and metric(pool, "failures_total") == 5.0
    assert metric(pool, "replicas_up") == 1.0


async def test_a_slow_answer_is_asked_again_elsewhere():
    slow, well = Fake("slow", "slow"), Fake("well", delay_s=0.01)
    pool = pool_of(slow, well)
    result = await pool.score(stored())
    assert (slow.asked, result.body) == (1, "well")
    assert slow.in_flight == 0  # not waited for any more


async def test_the_breaker_opens_after_three_failures_and_closes_on_probation():
    slow, well = Fake("slow", "slow"), Fake("well")
    pool = pool_of(slow, well)
    for index in range(6):
        assert (await pool.score(stored(index))).body == "well"
    assert slow.asked == 3 and metric(pool, "replicas_up") == 1.0
    slow.mood = "well"
    await asyncio.sleep(0.12)
    results = [(await pool.score(stored(index))).body for index in range(3)]
    assert results[0] == "slow" and metric(pool, "replicas_up") == 2.0  # the probe closed it


async def test_one_request_alone_goes_to_a_replica_on_probation_and_a_failed_one_replaces_it():
    slow, new = Fake("slow", "slow"), Fake("new")
    pool = pool_of(slow, spare=[new], max_attempts=9)
    assert (await pool.score(stored())).body == "new"
    assert slow.asked == 4 and metric(pool, "replacements_total") == 1.0
    many, spare = Fake("many", "slow"), Fake("spare")
    crowded = pool_of(many, spare=[spare], max_attempts=9)
    await asyncio.gather(*(crowded.score(stored(i)) for i in range(8)))
    assert many.asked == 8 + 2 + 1  # eight at once open it (two come back before), and do not count as probes


async def test_a_success_forgets_failures():
    fake = Fake("a")
    pool = pool_of(fake, max_attempts=1)
    for mood in ("slow", "slow", "well", "slow", "slow", "well"):
        fake.mood = mood
        result = await pool.score(stored())
        assert isinstance(result, LostTrajectory) == (mood == "slow")
    assert metric(pool, "replicas_up") == 1.0


async def test_a_trajectory_that_no_one_can_score_is_lost_with_its_reason():
    pool = pool_of(Fake("a", "bad"), Fake("b", "bad"))
    lost = await pool.score(stored(7))
    assert lost.key == TrajectoryKey(0, "7", 0) and lost.reason is LossReason.TEACHER_FAILED
    assert lost.detail.startswith("teacher t, 3 attempts, last: bad on ")
    slow = await pool_of(Fake("a", "slow"), max_attempts=2).score(stored())
    assert slow.detail == "teacher t, 2 attempts, last: no answer within 0.25 s"


async def test_without_a_replica_that_could_be_started_it_ends():
    pool = pool_of(Fake("a", "down"), spare=[OSError("no memory")] * 3)
    with pytest.raises(WorkerDownError, match="teacher t: no replica is left") as raised:
        await pool.score(stored())
    assert str(raised.value.__cause__) == "no memory"


async def test_a_replica_that_cannot_be_replaced_leaves_its_work_to_the_others():
    pool = pool_of(Fake("a", "down"), Fake("b", delay_s=0.001), spare=[OSError("no memory")] * 3)
    results = [await pool.score(stored(i)) for i in range(20)]
    assert {result.body for result in results} == {"b"}


async def test_an_open_breaker_is_waited_for_also_after_a_replacement_that_failed_at_first():
    new = Fake("new", "slow")
    pool = pool_of(Fake("a", "down"), spare=[OSError("no memory"), new], max_attempts=4)
    assert isinstance(await pool.score(stored()), LostTrajectory)  # down once, then three times too late
    new.mood = "well"
    assert (await pool.score(stored())).body == "new"


async def test_nothing_is_replaced_once_it_is_closed():
    dead = Fake("a", "down", delay_s=0.02)
    pool = pool_of(dead, spare=[])
    late = asyncio.create_task(pool.score(stored()))
    await asyncio.sleep(0.01)
    await pool.close()
    await asyncio.wait_for(late, 2.0)
    assert not pool._replicas._replacing and metric(pool, "replacements_total") == 0.0


async def test_a_mistake_in_the_code_is_loud():
    class Broken:
        async def score(self, one):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await pool_of(Broken()).score(stored())


async def test_closing_stops_a_replacement():
    pool = pool_of(Fake("a", "down"), Fake("b", delay_s=0.001), spare=[OSError()] * 2)
    module._PAUSES_S = (3600.0,)
    await asyncio.gather(*(pool.score(stored(i)) for i in range(2)))
    await asyncio.wait_for(pool.close(), 1.0)
    assert not pool._replicas._replacing


async def test_sources_have_their_teachers_and_the_rest_the_default():
    maths, rest = pool_of(Fake("m"), name="m"), pool_of(Fake("r"), name="r")
    router = TeacherRouter({"math": maths, "aime": maths}, rest)
    found = [(await router.score(stored(source=source))).body for source in ("math", "aime", "code")]
    assert found == ["m", "m", "r"]
    names = [series("eopd_teacher_tokens_total", teacher=name) for name in ("m", "r")]
    assert [router.metrics()[name] for name in names] == [10.0, 5.0]
    with pytest.raises(KeyError, match="code"):
        await TeacherRouter({"math": maths}, None).score(stored(source="code"))
