import fakes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eopd.learner.collate import Weighting, collate
from eopd.types import Exact, ScoredTrajectory, TeacherSignal

K = 3


def scored(
    prompt: list[int], response: list[int], *, seed: int = 0, mask: list[bool] | None = None
) -> ScoredTrajectory:
    rng = np.random.default_rng(seed)
    length = len(response)

    def floats(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return ScoredTrajectory(
        trajectory=fakes.trajectory(
            response, of=fakes.prompt("p", prompt), mask=mask, logprobs=floats(length)
        ),
        signal=TeacherSignal(
            teacher="t",
            token_logprobs=floats(length),
            entropy=Exact(floats(length)),
            topk_ids=rng.integers(0, 50, (length, K)).astype(np.int32),
            topk_logprobs=floats(length, K),
            tail_logprobs=floats(length),
        ),
    )


def weighting(gate: list[float], *, bonus: float | None = None) -> Weighting:
    """An entropy of gate + 3 tells the two columns apart."""
    gate_R = torch.tensor(gate)
    return Weighting(entropy_R=gate_R + 3, gate_R=gate_R, gate_uncertain=0.0, advantage_bonus=bonus)


def weighting_of(one: ScoredTrajectory, bonus: float | None = None) -> Weighting:
    return weighting(
        [position / 10 for position in range(one.trajectory.response_ids.size)], bonus=bonus
    )


def test_the_worked_example():
    one = scored([5, 6], [7, 8, 2])
    packed = collate([one], [weighting([0.25, 0.5, 0.75])])
    assert packed.input_ids_T.tolist() == [5, 6, 7, 8]
    assert packed.position_ids_T.tolist() == [0, 1, 2, 3]
    assert packed.tokens.loss_mask_T.tolist() == [False, True, True, True]
    assert packed.tokens.target_ids_T[1:].tolist() == [7, 8, 2]
    assert packed.tokens.gate_T[1:].tolist() == [0.25, 0.5, 0.75]
    assert packed.rows == (slice(1, 4),)


def test_a_response_position_that_is_masked_stays_masked():
    packed = collate([scored([5], [7, 8, 9], mask=[True, False, True])], [weighting([1.0] * 3)])
    assert packed.tokens.loss_mask_T.tolist() == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_every_row_says_what_its_sequence_position_says(lengths):
    rng = np.random.default_rng(1)
    batch = [
        scored(rng.integers(0, 50, p).tolist(), rng.integers(0, 50, r).tolist(), seed=i)
        for i, (p, r) in enumerate(lengths)
    ]
    packed = collate(batch, [weighting_of(one, bonus=float(i)) for i, one in enumerate(batch)])
    seen = 0

    for number, (one, rows) in enumerate(zip(batch, packed.rows, strict=True)):
        trajectory, signal = one.trajectory, one.signal
        sequence = [*trajectory.prompt.token_ids.tolist(), *trajectory.response_ids.tolist()]
        assert rows.stop - rows.start == trajectory.response_ids.size

        for position in range(len(sequence) - 1):
            row, response_position = (
                seen + position,
                position + 1 - trajectory.prompt.token_ids.size,
            )
            assert packed.input_ids_T[row] == sequence[position]
            assert packed.position_ids_T[row] == position
            assert packed.tokens.loss_mask_T[row] == (response_position >= 0)
            if response_position < 0:
                continue

            assert rows.start <= row < rows.stop
            assert packed.tokens.target_ids_T[row] == sequence[position + 1]
            assert packed.tokens.gate_T[row] == pytest.approx(response_position / 10)
            assert (
                packed.tokens.rollout_logprobs_T[row]
                == trajectory.rollout_logprobs[response_position]
            )
            assert packed.tokens.teacher_logprobs_T[row] == signal.token_logprobs[response_position]
            assert packed.tokens.teacher_entropy_T[row] == pytest.approx(response_position / 10 + 3)
            assert packed.tokens.advantage_bonus_T[row] == number
            assert (
                packed.tokens.teacher_topk_ids_TK[row].tolist()
                == signal.topk_ids[response_position].tolist()
            )
            assert (
                packed.tokens.teacher_topk_logprobs_TK[row].tolist()
                == signal.topk_logprobs[response_position].tolist()
            )
            assert (
                packed.tokens.teacher_tail_logprobs_T[row]
                == signal.tail_logprobs[response_position]
            )

        seen += len(sequence) - 1

    assert len(packed.input_ids_T) == seen


def test_an_empty_micro_batch_is_one_masked_row():
    packed = collate([], [])
    assert packed.input_ids_T.shape == packed.position_ids_T.shape == (1,)
    assert packed.tokens.loss_mask_T.tolist() == [False]
    assert packed.tokens.teacher_topk_ids_TK.shape[0] == 1
    assert packed.rows == ()


def test_an_empty_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\(0, 'p', 0\).*prompt is empty"):
        collate([scored([], [7])], [weighting([1.0])])


def test_without_a_verifier_there_is_no_bonus():
    assert collate([scored([5], [7])], [weighting([1.0])]).tokens.advantage_bonus_T is None
