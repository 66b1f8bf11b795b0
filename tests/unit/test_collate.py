import fakes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eopd.learner.collate import Weighting, collate
from eopd.loss.chunked import LossTokens
from eopd.types import Exact, ScoredTrajectory, TeacherSignal

K = 3


def scored(
    prompt: list[int],
    response: list[int],
    *,
    seed: int = 0,
    mask: list[bool] | None = None,
) -> ScoredTrajectory:
    rng = np.random.default_rng(seed)
    length = len(response)

    def floats(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return ScoredTrajectory(
        trajectory=fakes.trajectory(
            response,
            of=fakes.prompt("p", prompt),
            mask=mask,
            logprobs=floats(length),
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
    return Weighting(
        entropy_R=gate_R + 3,
        gate_R=gate_R,
        gate_uncertain=0.0,
        advantage_bonus=bonus,
    )


def weighting_of(scored: ScoredTrajectory, bonus: float | None = None) -> Weighting:
    length = scored.trajectory.response_ids.size
    return weighting([position / 10 for position in range(length)], bonus=bonus)


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
    masked = scored([5], [7, 8, 9], mask=[True, False, True])
    packed = collate([masked], [weighting([1.0] * 3)])
    assert packed.tokens.loss_mask_T.tolist() == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_every_row_says_what_its_sequence_position_says(lengths):
    rng = np.random.default_rng(1)
    batch, weightings = [], []
    for number, (num_prompt, num_response) in enumerate(lengths):
        prompt = rng.integers(0, 50, num_prompt).tolist()
        response = rng.integers(0, 50, num_response).tolist()
        batch.append(scored(prompt, response, seed=number))
        weightings.append(weighting_of(batch[-1], bonus=float(number)))

    packed = collate(batch, weightings)
    tokens = packed.tokens
    seen = 0

    for number, (of_batch, rows) in enumerate(zip(batch, packed.rows, strict=True)):
        trajectory = of_batch.trajectory
        prompt = trajectory.prompt.token_ids.tolist()
        sequence = [*prompt, *trajectory.response_ids.tolist()]
        assert rows.stop - rows.start == trajectory.response_ids.size

        for position in range(len(sequence) - 1):
            row = seen + position
            of_response = position + 1 - len(prompt)
            assert packed.input_ids_T[row] == sequence[position]
            assert packed.position_ids_T[row] == position
            assert tokens.loss_mask_T[row] == (of_response >= 0)
            if of_response >= 0:
                assert rows.start <= row < rows.stop
                assert tokens.target_ids_T[row] == sequence[position + 1]
                assert tokens.advantage_bonus_T[row] == number
                require_row(tokens, row, of_batch, of_response)

        seen += len(sequence) - 1

    assert len(packed.input_ids_T) == seen


def require_row(tokens: LossTokens, row: int, scored: ScoredTrajectory, position: int) -> None:
    """What a row holds of a position of the response."""
    logprobs = scored.trajectory.rollout_logprobs
    signal = scored.signal
    top_ids = tokens.teacher_topk_ids_TK[row]
    top_logprobs = tokens.teacher_topk_logprobs_TK[row]
    assert tokens.gate_T[row] == pytest.approx(position / 10)
    assert tokens.teacher_entropy_T[row] == pytest.approx(position / 10 + 3)
    assert tokens.rollout_logprobs_T[row] == logprobs[position]
    assert tokens.teacher_logprobs_T[row] == signal.token_logprobs[position]
    assert top_ids.tolist() == signal.topk_ids[position].tolist()
    assert top_logprobs.tolist() == signal.topk_logprobs[position].tolist()
    assert tokens.teacher_tail_logprobs_T[row] == signal.tail_logprobs[position]


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
    packed = collate([scored([5], [7])], [weighting([1.0])])
    assert packed.tokens.advantage_bonus_T is None
