"""Packs trajectories into the tensors of a micro-batch: the only place in the learner that shifts.

Row t of a packed micro-batch is an input token. All that belongs to row t (its target, its mask,
the teacher's numbers) is about the *next* token of the same trajectory. So the last response token
is never an input: nothing is predicted from it.

For example prompt ``5 6`` with response ``7 8 2``, and prompt ``9`` with response ``4 2``, where 2
is the end token, become six rows:

    row                0   1   2   3 │ 4   5
    input_ids_T        5   6   7   8 │ 9   4
    position_ids_T     0   1   2   3 │ 0   1       attention never crosses a restart at 0
    target_ids_T       -   7   8   2 │ 4   2       "-": masked, a prompt token is no target
    Packed.rows        slice(1, 4), slice(4, 6)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eopd.loss.chunked import LossTokens
from eopd.types import Int32Array, ScoredTrajectory, Stored

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """How the tokens of one trajectory enter the loss."""

    entropy_R: Tensor  # the teacher's, in nats, as the gate reads it
    gate_R: Tensor  # in [0, 1]
    # the gate at the highest entropy less the gate at the lowest, summed over loss tokens
    gate_uncertain: float
    advantage_bonus: float | None  # for every token; None without a verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One micro-batch: trajectories end to end, each with positions from 0.

    ``rows[i]`` are the rows that predict the response of trajectory i. An empty micro-batch has no
    such rows, but a single masked one, so that every rank makes the same forwards and backwards.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    tokens: LossTokens
    rows: tuple[slice, ...]

    def to(self, device: torch.device) -> Self:
        """Returns the same micro-batch on ``device``."""
        return replace(
            self,
            input_ids_T=self.input_ids_T.to(device),
            position_ids_T=self.position_ids_T.to(device),
            tokens=self.tokens.map(lambda column: column.to(device)),
        )


def body_of(stored: Stored[ScoredTrajectory]) -> ScoredTrajectory:
    """Returns the body of a trajectory that this rank has fetched."""
    return cast(ScoredTrajectory, stored.body)


def collate(trajectories: Sequence[ScoredTrajectory], weightings: Sequence[Weighting]) -> Packed:
    """Pack one micro-batch, on the CPU.

    Args:
        trajectories: any number, also none; each with a prompt and a response of at least one
            token.
        weightings: how each enters the loss; all with an advantage bonus, or none.

    Raises:
        ValueError: a trajectory has an empty prompt, from which nothing can be predicted.
    """
    if not trajectories:
        return _masked_row()

    columns = [
        _columns(scored, weighting)
        for scored, weighting in zip(trajectories, weightings, strict=True)
    ]
    packed = {}
    for name in columns[0]:
        packed[name] = np.concatenate([column[name] for column in columns])

    rows, start = [], 0
    for scored in trajectories:
        num_response = scored.trajectory.response_ids.size
        stop = start + scored.trajectory.prompt.token_ids.size - 1 + num_response
        rows.append(slice(stop - num_response, stop))
        start = stop

    return _packed(packed, tuple(rows))


def _columns(scored: ScoredTrajectory, weighting: Weighting) -> dict[str, npt.NDArray[np.generic]]:
    """Returns all columns [P + R - 1, ...] of one trajectory."""
    trajectory, signal = scored.trajectory, scored.signal
    num_prompt_tokens = trajectory.prompt.token_ids.size
    if num_prompt_tokens == 0:
        raise ValueError(
            f"trajectory {tuple(trajectory.key)}: the prompt is empty, its first response "
            "token has no predictor"
        )

    inputs = np.concatenate([trajectory.prompt.token_ids, trajectory.response_ids[:-1]])
    response: dict[str, npt.NDArray[np.generic]] = {
        "target_ids_T": trajectory.response_ids.astype(np.int64),
        "loss_mask_T": trajectory.loss_mask,
        "rollout_logprobs_T": trajectory.rollout_logprobs,
        "gate_T": weighting.gate_R.numpy(),
        "teacher_logprobs_T": signal.token_logprobs,
        "teacher_entropy_T": weighting.entropy_R.numpy(),
        "teacher_topk_ids_TK": signal.topk_ids.astype(np.int64),
        "teacher_topk_logprobs_TK": signal.topk_logprobs,
        "teacher_tail_logprobs_T": signal.tail_logprobs,
    }
    if weighting.advantage_bonus is not None:
        response["advantage_bonus_T"] = np.full(
            trajectory.response_ids.size, weighting.advantage_bonus, np.float32
        )

    shifted = {name: _behind_prompt(values, num_prompt_tokens) for name, values in response.items()}

    return {
        "input_ids_T": inputs.astype(np.int64),
        "position_ids_T": np.arange(inputs.size),
        **shifted,
    }


def _behind_prompt(
    values_R: npt.NDArray[np.generic], num_prompt_tokens: int
) -> npt.NDArray[np.generic]:
    """Shifts a column: the hidden state at P + r - 1 predicts response token r, so P - 1 masked
    rows come first.
    """
    prompt_rows = np.zeros((num_prompt_tokens - 1, *values_R.shape[1:]), values_R.dtype)
    return np.concatenate([prompt_rows, values_R])


def collate_text(token_ids: Int32Array) -> Packed:
    """Packs a text of int32[N], N > 1, into N - 1 rows without a teacher, for the student's own
    log-probabilities.
    """
    ids = token_ids.astype(np.int64)
    return _unscored(
        ids[:-1],
        ids[1:],
        np.ones(ids.size - 1, np.bool_),
        (slice(0, ids.size - 1),),
    )


def _masked_row() -> Packed:
    row = np.zeros(1, np.int64)
    return _unscored(row, row, np.zeros(1, np.bool_), ())


def _unscored(
    input_ids: Int64Array,
    target_ids: Int64Array,
    mask: npt.NDArray[np.bool_],
    rows: tuple[slice, ...],
) -> Packed:
    floats = np.zeros(len(mask), np.float32)
    columns: dict[str, npt.NDArray[np.generic]] = {
        "input_ids_T": input_ids,
        "position_ids_T": np.arange(len(mask)),
        "target_ids_T": target_ids,
        "loss_mask_T": mask,
        "rollout_logprobs_T": floats,
        "gate_T": floats,
        "teacher_logprobs_T": floats,
        "teacher_entropy_T": floats,
        "teacher_topk_ids_TK": np.zeros((len(mask), 1), np.int64),
        "teacher_topk_logprobs_TK": floats[:, None],
        "teacher_tail_logprobs_T": floats,
    }
    return _packed(columns, rows)


def _packed(columns: Mapping[str, npt.NDArray[np.generic]], rows: tuple[slice, ...]) -> Packed:
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    input_ids_T, position_ids_T = tensors.pop("input_ids_T"), tensors.pop("position_ids_T")
    tokens = LossTokens(**tensors)
    return Packed(
        input_ids_T=input_ids_T,
        position_ids_T=position_ids_T,
        tokens=tokens,
        rows=rows,
    )
