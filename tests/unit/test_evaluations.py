"""What was measured, as it is kept, and the checkpoints that it makes the best."""

import fakes
import pytest

from eopd.config import ConfigError, KeepBestConfig, load_config
from eopd.run.checkpoint import list_checkpoints, step_of
from eopd.run.directory import RunDirectory
from eopd.run.evaluations import (
    Evaluation,
    append_evaluation,
    best_checkpoints,
    newest,
    ranked,
    read_evaluations,
)
from eopd.run.record import Best, Measurement
from eopd.run.upload import Uploads
from eopd.runtime.resume import take_up
from eopd.runtime.state import RunState

INPUTS = {"prompts.data": "1", "student.model": "2"}


def evaluation(step, value, *, name="math", metric="avg_at_n", phase="during", **more):
    return Evaluation(
        step=step,
        phase=phase,
        name=name,
        time=1.5,
        seconds=2.5,
        prompts=2,
        samples=4,
        measurements={metric: Measurement(mean=value, standard_error=0.5)},
        **more,
    )


class Learner:
    async def save(self, directory):
        await fakes.save_weights(directory)


class Exporter(Learner):
    """Writes down what it is asked for."""

    def __init__(self):
        self.asked = []

    async def load(self, directory):
        self.asked.append(("load", directory.parent.name))

    async def export(self, directory, adapter):
        self.asked.append(("export", directory.name, adapter.name))


def test_a_line_holds_an_evaluation_and_what_it_has_not_is_absent(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    assert read_evaluations(path) == []
    first = evaluation(0, 0.25, phase="before", by_prompt={"avg_at_n": {"p": 0.25}})
    second = evaluation(
        5, 0.5, differences={"avg_at_n": Measurement(mean=0.25)}, by_prompt={"avg_at_n": {"p": 0.5}}
    )
    for one in (first, second):
        append_evaluation(path, one)

    lines = fakes.read_rows(path)
    assert lines[0] == {
        "step": 0,
        "phase": "before",
        "name": "math",
        "time": 1.5,
        "seconds": 2.5,
        "prompts": 2,
        "samples": 4,
        "measurements": {"avg_at_n": {"mean": 0.25, "standard_error": 0.5}},
        "by_prompt": {"avg_at_n": {"p": 0.25}},
    }
    assert lines[1]["differences"] == {"avg_at_n": {"mean": 0.25, "standard_error": None}}

    with path.open("a") as file:
        file.write('{"step": 9}\n{"step": 1')

    assert read_evaluations(path) == [first, second]
    assert newest([first, evaluation(5, 1.0, name="held_out"), second]) == [
        second,
        evaluation(5, 1.0, name="held_out"),
    ]


@pytest.mark.parametrize(("mode", "steps"), [("max", [20, 10, 30, 5]), ("min", [5, 10, 30, 20])])
def test_the_best_comes_first_and_of_equal_ones_the_earlier(mode, steps):
    measured = [
        evaluation(0, 99.0, phase="before"),
        evaluation(5, 0.1),
        evaluation(10, 0.2),
        evaluation(20, 0.0),
        evaluation(20, 0.9),  # once more: the last line of a step holds
        evaluation(30, 0.2, phase="after"),
        evaluation(15, 99.0, name="other"),
        evaluation(25, 99.0, metric="pass_at_4"),
        evaluation(35, float("nan")),
    ]
    best = ranked(measured, KeepBestConfig(metric="math/avg_at_n", mode=mode))
    assert [one.step for one in best] == steps
    assert {one.metric for one in best} == {"math/avg_at_n"}


@pytest.fixture
def config(tmp_path):
    def load(keep_best="{metric: math/avg_at_n, mode: max, n: 2}", *overrides):
        path = fakes.write_config(
            tmp_path,
            batches=60,
            more=f"checkpoint: {{every: 10, keep_last: 2, keep_best: {keep_best}}}\n"
            "evaluation: {every: 5, benchmarks: [{name: math, data: m.jsonl, samples: 4}]}\n",
        )
        return load_config(path, overrides)

    return load


def begin(config) -> RunState:
    taken_up = take_up(config, INPUTS)
    taken_up.begin()
    return RunState(taken_up, Uploads(taken_up.config, print))


async def measured(state: RunState, values: dict[int, float], learner=None) -> None:
    """Train to each step, save where that is due, and measure there."""
    for step, value in values.items():
        state.progress.step = step
        if state.is_due:
            await state.save(learner or Learner())

        state.expect(["math"])
        state.record(evaluation(step, value))


def steps(state: RunState) -> list[int]:
    return [step_of(path) for path in list_checkpoints(state.directory.checkpoints)]


async def test_the_best_stay_beside_the_newest_and_the_regular(config):
    state = begin(config())
    await measured(state, {5: 0.3, 10: 0.9, 15: 0.5, 20: 0.2, 25: 0.1, 30: 0.4, 35: 0.3})
    # 10 and 15 are the best; 20 and 30 are of checkpoint.every, 30 and 35 the newest
    assert steps(state) == [10, 15, 20, 30, 35]
    best = Best(step=10, metric="math/avg_at_n", value=0.9)
    assert state.progress.best == best
    assert state.directory.read_summary().best == best

    await measured(state, {40: 0.8, 45: 0.7, 50: 0.6})
    assert steps(state) == [10, 40, 45, 50]


async def test_a_candidate_stays_until_it_is_measured(config):
    state = begin(config())
    await measured(state, {5: 0.5, 10: 0.6})
    state.progress.step = 15
    assert state.is_due
    await state.save(Learner())
    state.expect(["held_out", "math"])

    for step in (20, 25, 30):
        state.progress.step = step
        await state.save(Learner())

    assert steps(state) == [5, 10, 15, 20, 25, 30]
    state.record(evaluation(15, 0.1))
    assert steps(state) == [5, 10, 20, 25, 30]


async def test_a_measurement_that_will_not_come_keeps_nothing(config):
    state = begin(config())
    state.progress.step = 5
    await state.save(Learner())
    state.expect(["math"])
    state.expect_no_more(["held_out"])
    await measured(state, {20: 0.1, 25: 0.2, 30: 0.3})
    assert 5 in steps(state)
    state.expect_no_more(["held_out", "math"])
    await measured(state, {35: 0.3})
    assert 5 not in steps(state)


async def test_without_keep_best_the_newest_stay_alone(config):
    state = begin(config("null"))
    state.progress.step = 5
    assert not state.is_due
    await measured(state, {10: 0.9, 20: 0.1, 30: 0.1})
    assert steps(state) == [20, 30]
    assert state.directory.read_summary().best is None


@pytest.mark.parametrize("keep_best", ["null", "{metric: math/avg_at_n, mode: max}"])
async def test_the_checkpoint_from_before_a_collapse_stays_as_long_as_that_lasts(config, keep_best):
    """Also when a measurement after it removes what is needless."""
    state = begin(config(keep_best, "checkpoint.keep_last=1"))
    await measured(state, {10: 0.1, 20: 0.2})
    state.spared = lambda: 20
    await measured(state, {30: 0.3, 40: 0.4})
    state.record(evaluation(40, 0.9, phase="after"))
    assert steps(state) == [20, 40]

    state.spared = lambda: None
    await measured(state, {50: 0.95})
    assert steps(state) == [50]


async def test_which_are_best_outlives_the_process_and_a_roll_back(config):
    state = begin(config())
    await measured(state, {5: 0.9, 10: 0.3, 15: 0.8, 20: 0.1})
    state.end("interrupted")

    again = RunState(take_up(config(), INPUTS, "yes"), Uploads(config(), print))
    again.go_on()
    assert again.progress.best.step == 5
    assert again.is_measured("math")
    await measured(again, {25: 0.2, 30: 0.2, 35: 0.85})
    assert steps(again) == [5, 20, 30, 35]

    again.progress.step = 40
    again.record(evaluation(40, 0.99))
    assert again.progress.best.step == 5, "there is no checkpoint of step 40"
    again.roll_back()
    assert again.progress.step == 35
    assert [one.step for one in again.evaluations] == [5, 10, 15, 20, 25, 30, 35]
    assert again.directory.read_summary().best.step == 5

    back = RunState(take_up(config(), INPUTS, "yes", 20), Uploads(config(), print))
    back.go_on()
    assert back.progress.best.step == 5
    assert [one.step for one in back.evaluations] == [5, 10, 15, 20]
    assert steps(back) == [5, 20]


async def test_the_last_student_and_the_best_are_exported(config):
    state, learner = begin(config()), Exporter()
    await state.export(learner)
    assert learner.asked == [("export", "hf", "adapter")]

    await measured(state, {5: 0.9, 10: 0.3})
    learner.asked = []
    await state.export(learner)
    best = ("export", "hf-best", "hf-best-adapter")
    assert learner.asked == [("export", "hf", "adapter"), ("load", "step-000005"), best]

    await measured(state, {15: 0.95})
    learner.asked = []
    await state.export(learner)
    assert learner.asked == [("export", "hf", "adapter"), best]


async def test_a_run_that_begins_anew_has_no_best_of_an_older_one(config):
    state = begin(config())
    (state.directory.path / "hf-best").mkdir()
    append_evaluation(state.directory.evaluations, evaluation(5, 0.9))
    begin(config())
    assert not (state.directory.path / "hf-best").exists()
    assert not state.directory.evaluations.exists()


async def test_the_best_step_is_found_or_one_message_says_why_not(config):
    state = begin(config())
    with pytest.raises(ConfigError, match="holds no checkpoint whose math/avg_at_n was measured"):
        state.directory.best_step()

    await measured(state, {5: 0.9, 10: 0.3})
    assert state.directory.best_step() == 5

    (state.directory.checkpoints / "step-000005" / "manifest.json").unlink()
    assert state.directory.best_step() == 10
    keep_best = config().checkpoint.keep_best
    assert best_checkpoints(state.directory.checkpoints, [], keep_best) == []

    for checkpoint in list_checkpoints(state.directory.checkpoints):
        (checkpoint / "state.json").unlink()

    these = r"these are not whole: .*, step-000010 \(state.json is missing\)"
    with pytest.raises(ConfigError, match=f"whose math/avg_at_n was measured; {these}"):
        state.directory.best_step()

    with pytest.raises(ConfigError, match=f"holds no checkpoint; {these}"):
        state.directory.checkpoint(None)

    directory = RunDirectory.create(config("null"))
    with pytest.raises(ConfigError, match=r"keeps no best \(checkpoint.keep_best is null\)"):
        directory.best_step()


def test_the_numbers_of_single_prompts_stay_in_memory_for_the_first_of_a_name(config):
    state = begin(config())
    for step in (1, 2):
        for name in ("math", "code"):
            state.record(evaluation(step, 0.5, name=name, by_prompt={"avg_at_n": {"p": 0.5}}))

    assert [bool(one.by_prompt) for one in state.evaluations] == [True, True, False, False]
    assert all(one.by_prompt for one in read_evaluations(state.directory.evaluations))
