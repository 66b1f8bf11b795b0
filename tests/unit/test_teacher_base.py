"""What every teacher does to a trajectory, on a teacher of ten lines."""

import fakes
import numpy as np
import pytest

from eopd.config import TeacherConfig
from eopd.roles import TeacherDownError
from eopd.teacher import base
from eopd.teacher.base import SignalScorer
from eopd.teacher.signal import SignalError
from eopd.types import (
    Bounds,
    Exact,
    LostReason,
    LostTrajectory,
    StopReason,
    TeacherSignal,
)

OWN_END, THEIR_END = 1, 2


class Fake(SignalScorer):
    """Notes what it was asked; every candidate is its end token."""

    def __init__(self, entropy=None, error=None):
        config = TeacherConfig(name="t", model="/nowhere", eos_remap={OWN_END: THEIR_END})
        super().__init__(config, top_k=1, vocab_size=10)
        self.entropy, self.error, self.asked = entropy, error, []

    seats = 1

    async def ping(self):
        pass

    async def signal(self, prompt_ids, response_ids):
        self.asked.append(
            base.whole_sequence(
                self._vocab_size,
                prompt_ids,
                response_ids,
            ).tolist()
        )
        if self.error is not None:
            raise self.error

        zeros = np.zeros(len(response_ids), np.float32)

        return TeacherSignal(
            teacher="t",
            token_logprobs=zeros - 0.5,
            entropy=self.entropy or Exact(zeros + 2.0),
            topk_ids=np.full((len(zeros), 1), THEIR_END, np.int32),
            topk_logprobs=np.log(np.full((len(zeros), 1), 0.75, np.float32)),
            tail_logprobs=np.log(np.full(len(zeros), 0.25, np.float32)),
        )

    async def close(self):
        pass


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch):
    monkeypatch.setattr(base, "num_tokens", lambda directory: 10)


def stored(response, stop=StopReason.END_TOKEN, teacher_prompt=None):
    body = fakes.trajectory(
        response,
        of=fakes.prompt(for_teacher=teacher_prompt),
        stop=stop,
    )
    return fakes.stored(body, {"generate_s": 1.0})


async def test_the_teacher_reads_its_copy_and_its_candidates_come_back_in_the_student_s_words():
    fake, one = Fake(), stored([7, OWN_END])
    scored = await fake.score(one)
    assert fake.asked == [[5, 6, 7, THEIR_END]]
    assert scored.body.trajectory is one.body
    assert scored.body.signal.topk_ids.tolist() == [[OWN_END], [OWN_END]]
    await fake.score(stored([7, OWN_END], StopReason.LENGTH))
    assert fake.asked[1] == [5, 6, 7, OWN_END]


async def test_a_prompt_of_its_own_takes_the_place_of_the_student_s():
    fake = Fake()
    scored = await fake.score(stored([7, 8], StopReason.LENGTH, teacher_prompt=[9, 9, 9]))
    assert fake.asked == [[9, 9, 9, 7, 8]]
    assert len(scored.body.signal.token_logprobs) == 2


@pytest.mark.parametrize(
    "entropy", [None, Bounds(low=np.array([1.0, 2.0]), high=np.array([2.0, 3.0]))]
)
async def test_sums_go_into_the_header(entropy):
    sums = (await Fake(entropy).score(stored([7, 8], StopReason.LENGTH))).header.sums
    assert sums["generate_s"] == 1.0 and 0.0 <= sums["score_s"] < 1.0
    assert sums["teacher_logprob"] == pytest.approx(-1.0)
    assert sums["teacher_entropy"] == pytest.approx(4.0)


async def test_a_bad_trajectory_is_lost_and_a_teacher_that_is_down_is_an_error():
    lost = await Fake(error=SignalError("row 3")).score(stored([7]))
    assert isinstance(lost, LostTrajectory)
    assert (lost.reason, lost.detail) == (LostReason.TEACHER_FAILED, "teacher t: row 3")
    outside = await Fake().score(stored([7, 10], StopReason.LENGTH))
    assert outside.detail == "teacher t: token id 10 is outside its vocabulary of 10"
    with pytest.raises(TeacherDownError):
        await Fake(error=TeacherDownError("gone")).score(stored([7]))
