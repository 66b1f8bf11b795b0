"""The guard finds a collapse, once, and is silent on everything else."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence

import fakes
import pytest

from eopd.config import ConfigError, load_config
from eopd.run.directory import RunDirectory
from eopd.run.progress import Progress
from eopd.run.record import Best
from eopd.runtime.guard import RunGuard
from eopd.runtime.resume import take_up
from eopd.telemetry.guard import Guard

# end-token rate, repetition, and reverse KL where it is not that of a sound student
SOUND, SICK, TORN = (0.9, 0.02), (0.3, 0.4), (0.6, 0.02, 3.0)


def rows_of(*parts: tuple[tuple[float, ...], int], start: int = 1) -> Iterator[dict[str, float]]:
    """Rows of a run: so many steps with the same numbers, then others."""
    steps = itertools.count(start)
    for numbers, count in parts:
        for _ in range(count):
            yield row(next(steps), *numbers)


def row(step: int, ended: float, repeated: float, reverse_kl: float = 0.2) -> dict[str, float]:
    return {
        "step": step,
        "eopd_step": float(step),
        "eopd_end_token_ratio": ended,
        "eopd_repetition_ratio": repeated,
        "eopd_reverse_kl_nats": reverse_kl,
        "eopd_teacher_entropy_nats": 2 * ended,
        "eopd_gate_ratio": ended / 3,
    }


def begins(rows: Sequence[dict[str, float]]) -> list[int]:
    """The steps at which a collapse begins."""
    guard = Guard()
    return [step for step, numbers in enumerate(rows, 1) if guard.take(numbers)]


@pytest.mark.parametrize(
    ("then", "step"),
    [
        ((0.45, 0.021), 30),  # half as many end, and all repeat more: just so
        ((0.46, 0.4), None),  # longer responses, most of which still end
        ((0.1, 0.02), None),  # no more repetition than before
        ((0.0, 1.0), 30),
    ],
)
def test_a_collapse_is_half_the_endings_and_more_repetition(then, step):
    assert begins(list(rows_of((SOUND, 20), (then, 30)))) == ([step] if step else [])


@pytest.mark.parametrize(
    ("before", "then", "step"),
    [
        (0.6, 1.21, 30),  # of the first ten, and twice as much
        (0.6, 1.19, None),
        (0.2, 1.01, 30),
        (0.2, 0.99, None),  # close to the teacher all the same
        (3.0, 0.2, None),
    ],
)
def test_it_is_one_too_to_be_twice_as_far_from_the_teacher_as_at_first(before, then, step):
    """Whatever endings and repetition do."""
    rows = rows_of(((0.9, 0.02, before), 10), (SOUND, 10), ((0.9, 0.0, then), 30))
    assert begins(list(rows)) == ([step] if step else [])


def test_every_step_must_be_further_than_any_of_the_first_ten():
    first = [((0.9, 0.02, 3.1), 1), ((0.9, 0.02, 0.3), 9)]
    assert begins(list(rows_of(*first, (SOUND, 10), (TORN, 30)))) == []
    assert begins(list(rows_of(*first, (SOUND, 10), ((0.9, 0.02, 3.2), 10)))) == [30]


@pytest.mark.parametrize(
    ("sick", "numbers"), [(SICK, SOUND), (SICK, (0.3, 0.02)), (SICK, (0.9, 0.4)), (TORN, SOUND)]
)
def test_one_step_that_is_none_of_a_collapse_delays_the_word(sick, numbers):
    rows = list(rows_of((SOUND, 20), (sick, 30)))
    rows[23] = row(24, *numbers)  # leaves the newest ten with step 34
    assert begins(rows) == [34]


def test_the_newest_ten_are_compared_with_ten_that_ended_before():
    assert begins(list(rows_of((SOUND, 10), (SICK, 10)))) == [20]
    assert begins(list(rows_of((SOUND, 9), (SICK, 30)))) == []


def test_the_best_ten_may_be_long_ago():
    slowly = [((0.9 - 0.002 * i, 0.02 + 0.002 * i), 1) for i in range(400)]
    (step,) = begins(list(rows_of(*slowly)))
    # 0.891 over steps 1 to 10, and half of it over steps 224 to 233
    assert step == 233


def test_it_is_told_once_and_again_after_a_recovery():
    rows = rows_of((SOUND, 20), (SICK, 30), (SOUND, 20), (SICK, 20))
    assert begins(list(rows)) == [30, 80]


def test_a_collapse_lasts_until_the_mean_is_that_of_the_worst_of_the_best_ten():
    best = itertools.chain(*itertools.repeat([(SOUND, 1), ((0.6, 0.02), 1)], 10))
    guard = Guard.replay(rows_of(*best, (SICK, 10)))
    ended = []
    for step in range(31, 41):
        guard.take(row(step, *SOUND))
        ended.append(guard.collapse is None)

    # five of 0.9 and five of 0.3 have the mean 0.6
    assert ended == [False] * 4 + [True] * 6


def test_the_message_has_the_numbers_of_both_windows():
    guard = Guard.replay(rows_of((SOUND, 20), (SICK, 10)))
    assert str(guard.collapse) == (
        "the student collapses: over steps 21 to 30, compared with steps 11 to 20, fewer responses "
        "end by themselves, and they repeat more (responses that end 90% -> 30%, repetition 2.0% "
        "-> 40.0%, reverse KL 0.20 -> 0.20 nats, teacher entropy 1.80 -> 0.60 nats, gate open 30% "
        "-> 10%)"
    )


def test_a_torn_student_is_compared_with_the_steps_nearest_to_the_teacher():
    guard = Guard.replay(
        rows_of(((0.9, 0.02, 1.4), 10), (SOUND, 10), ((1.0, 0.0, 0.5), 10), (TORN, 10))
    )
    assert str(guard.collapse) == (
        "the student collapses: over steps 31 to 40, compared with steps 11 to 20, it is further "
        "from the teacher than before it learned anything (responses that end 90% -> 60%, "
        "repetition 2.0% -> 2.0%, reverse KL 0.20 -> 3.00 nats, teacher entropy 1.80 -> 1.20 nats, "
        "gate open 30% -> 20%)"
    )


def test_a_torn_student_has_recovered_once_it_is_as_near_as_at_first():
    learned = ((0.9, 0.02, 1.4), 1), ((0.9, 0.02, 0.6), 9), (SOUND, 10)
    guard = Guard.replay(rows_of(*learned, ((0.9, 0.02, 3.0), 10)))
    assert guard.collapse is not None
    ended = []
    for step in range(31, 41):
        guard.take(row(step, 0.9, 0.02, 0.2))
        ended.append(guard.collapse is None)

    # 3 nats and 0.2 have a mean of 1.32 from the sixth on
    assert ended == [False] * 5 + [True] * 5


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("size", [8, 12, 64])
def test_it_is_silent_on_noise(rate, size):
    """Batches of independent responses; those that do not end repeat far more, and are further."""
    rng = random.Random(size)

    def noisy(step: int) -> dict[str, float]:
        ended = sum(rng.random() < rate for _ in range(size)) / size
        return row(
            step,
            ended,
            (1 - ended) * rng.uniform(0.0, 0.4),
            2 - ended + rng.random(),
        )

    assert begins([noisy(step) for step in range(1, 3001)]) == []


def test_a_row_without_its_numbers_is_passed_over():
    rows = list(rows_of((SOUND, 20), (SICK, 10)))
    older = {"step": 21, "eopd_step": 21.0, "eopd_end_token_ratio": 0.3}
    no_number = row(22, 0.3, 0.4) | {"eopd_repetition_ratio": None}
    assert begins([*rows[:20], older, no_number, {}, *rows[20:]]) == [33]


# --- in a run


@pytest.fixture
def run(tmp_path):
    """A function that makes a run, with rows, and checkpoints of some steps."""
    config = load_config(fakes.write_config(tmp_path, batches=60))

    async def make(rows, *checkpoints):
        directory = RunDirectory.create(config)
        directory.metrics.write_text("".join(json.dumps(numbers) + "\n" for numbers in rows))
        for step in checkpoints:
            state = fakes.driver_state(step, inputs={})
            await fakes.save_checkpoint(directory.checkpoints, state)

        directory.write_summary(Progress(step=max(checkpoints)).summary("collapsed"))
        return directory

    return make


def guard_of(directory, on_collapse, said, *, at):
    guard = RunGuard(on_collapse, directory, said.append)
    guard.go_on_from(at)
    return guard


async def test_a_run_is_warned_once_and_every_row_shows_it(run):
    rows, said = list(rows_of((SOUND, 20), (SICK, 20))), []
    directory = await run([], 10, 15, 30)
    guard = guard_of(directory, "warn", said, at=0)
    shown = [guard.take(numbers)["eopd_collapse"] for numbers in rows]
    assert shown == [0.0] * 29 + [1.0] * 11
    assert len(said) == 1
    assert "over steps 21 to 30, compared with steps 11 to 20" in said[0]
    assert "The best steps end with 20; go back with --resume --step 15, and see" in said[0]
    assert guard.ending is None
    guard.say_last_words()
    assert len(said) == 1


async def test_the_checkpoint_to_go_back_to_is_spared_as_long_as_a_collapse_lasts(run):
    rows = list(rows_of((SOUND, 20), (SICK, 20), (SOUND, 20)))
    directory = await run(rows, 10, 15, 30)
    guard = RunGuard("warn", directory, print)
    guard.go_on_from(0)
    then = [guard.take(numbers) and guard.spared() for numbers in rows]
    recovered = then.index(None, 29)
    assert recovered > 40, "the sick steps end with 40"
    assert then == [None] * 29 + [15] * (recovered - 29) + [None] * (60 - recovered)

    guard.go_on_from(35)
    assert guard.spared() == 15
    guard.go_on_from(20)
    assert guard.spared() is None


async def test_the_guard_ends_a_run_that_asks_for_it(run):
    rows, said = list(rows_of((SOUND, 20), (SICK, 10))), []
    guard = guard_of(await run([], 30), "stop", said, at=0)
    endings = [guard.take(numbers) and guard.ending is not None for numbers in rows]
    assert endings == [False] * 29 + [True]
    guard.say_last_words()
    assert "no checkpoint from there is left (checkpoint.every, checkpoint.keep_last)" in said[1]
    assert said[1].startswith("the guard has ended the run (guard.on_collapse is stop); hf/ is")
    assert "hf-best/" not in said[1]


async def test_the_last_words_name_the_best_student(run):
    said, directory = [], await run([], 30)
    best = Best(step=20, metric="held_out/reverse_kl", value=1.0)
    directory.write_summary(Progress(step=30, best=best).summary("running"))
    guard = guard_of(directory, "stop", said, at=0)
    for numbers in rows_of((SOUND, 20), (SICK, 10)):
        guard.take(numbers)

    guard.say_last_words()
    assert (
        "hf/ is the student as it is now, hf-best/ the best that was measured, of step 20. "
        in said[1]
    )


async def test_a_guard_that_is_off_reads_nothing(run):
    rows, said = rows_of((SOUND, 20), (SICK, 20)), []
    guard = guard_of(await run([], 30), "off", said, at=0)
    assert [guard.take(numbers) for numbers in rows] == [{}] * 40
    assert said == []


@pytest.mark.parametrize("at", [5, 19, 20, 25, 29])
async def test_what_it_has_read_survives_a_resume(run, at):
    """Also the rows after the checkpoint, which are read again."""
    rows, said = list(rows_of((SOUND, 20), (SICK, 20))), []
    guard = guard_of(await run(rows, 40), "warn", said, at=at)
    shown = [guard.take(numbers)["eopd_collapse"] for numbers in rows[at:]]
    assert shown == ([0.0] * 29 + [1.0] * 11)[at:]
    assert len(said) == 1


async def test_a_collapse_that_was_told_is_not_told_again_after_a_resume(run):
    rows, said = list(rows_of((SOUND, 20), (SICK, 20))), []
    guard = guard_of(await run(rows, 35), "warn", said, at=35)
    assert [guard.take(numbers)["eopd_collapse"] for numbers in rows[35:]] == [1.0] * 5
    assert said == []


async def test_a_run_that_stops_on_collapse_does_not_go_on_from_one(run, tmp_path):
    directory = await run(rows_of((SOUND, 20), (SICK, 20)), 20, 40)
    stop = load_config(tmp_path / "c.yaml", ["run.batches=60", "guard.on_collapse=stop"])
    for resume in ("yes", "auto"):
        with pytest.raises(ConfigError) as caught:
            take_up(stop, {}, resume)

        message = str(caught.value)
        assert message.startswith(f"guard.on_collapse: is stop, and at step 40 of {directory.path}")
        assert "go back with --resume --step 20" in message
        assert message.endswith("or go on with --set guard.on_collapse=warn")

    assert take_up(stop, {}, "yes", 20).state.step == 20
    warn = load_config(tmp_path / "c.yaml", ["guard.on_collapse=warn"])
    assert take_up(warn, {}, "yes").state.step == 40
