"""Makes a record of a held-out sample, with what student and teacher gave every token."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eopd.types import ScoredTrajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECIMALS = 4


def sample_record(
    scored: ScoredTrajectory, prompt: str, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, object]:
    """Returns a sample as ``held_out.jsonl`` keeps it.

    Lists of R response tokens, and of K candidates for each, in nats; null is minus infinity.
    ``student_logprobs`` are the engine's, which wrote at temperature 1. ``entropy_low`` and
    ``_high`` are equal where the teacher's entropy is exact. ``texts`` has the text of every token
    id that occurs.
    """
    trajectory, signal = scored.trajectory, scored.signal
    ids = sorted({*trajectory.response_ids.tolist(), *signal.topk_ids.ravel().tolist()})

    return {
        "prompt_id": trajectory.prompt.prompt_id,
        "prompt": prompt,
        "response": tokenizer.decode(trajectory.response_ids, skip_special_tokens=True),
        "teacher": signal.teacher,
        "ids": trajectory.response_ids.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        "student_logprobs": _numbers(trajectory.rollout_logprobs),
        "teacher_logprobs": _numbers(signal.token_logprobs),
        "entropy_low": _numbers(signal.entropy_low),
        "entropy_high": _numbers(signal.entropy_high),
        "topk_ids": signal.topk_ids.tolist(),
        "topk_logprobs": [_numbers(row) for row in signal.topk_logprobs],
        "texts": token_texts(
            ids, lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False))
        ),
    }


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> Mapping[int, str]:
    """Returns the text that each token adds inside a text, such as ``" the"``, where some
    tokenizers strip the space of a first token.
    """
    return {token: decode([token, token])[len(decode([token])) :] for token in ids}


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    return [round(value, _DECIMALS) if np.isfinite(value) else None for value in values.tolist()]
