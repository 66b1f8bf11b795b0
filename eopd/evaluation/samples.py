"""Makes records of responses for people to look at, with what student and teacher gave every token."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eopd.types import Header, ScoredTrajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECIMALS = 4


def sample_record(
    scored: ScoredTrajectory, prompt: str, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, object]:
    """Returns a sample as ``held_out.jsonl`` keeps it.

    Lists of R response tokens, and of K candidates for each, in nats; null is minus infinity.
    ``student_logprobs`` are the engine's, which wrote at ``rollout.temperature``. ``entropy_low`` and
    ``_high`` are equal where the teacher's entropy is exact. ``texts`` has the text of every token
    id that occurs.
    """
    signal = scored.signal
    candidates = set(signal.topk_ids.ravel().tolist())
    return {
        **_record(scored, prompt, tokenizer, candidates),
        "topk_ids": signal.topk_ids.tolist(),
        "topk_logprobs": [_numbers(row) for row in signal.topk_logprobs],
    }


def response_record(
    header: Header, scored: ScoredTrajectory, prompt: str, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, object]:
    """Returns a training response as ``responses.jsonl`` keeps it: as ``sample_record``, without
    the candidates, and with what its header says. ``reward`` is null where the run has none.
    """
    return {
        "epoch": header.key.epoch,
        "sample_index": header.key.sample_index,
        "source": header.source,
        "reward": header.reward,
        "stop_reason": header.stop_reason.value,
        "versions": [header.oldest_version, header.newest_version],
        "sums": dict(header.sums),
        **_record(scored, prompt, tokenizer, set()),
    }


def _record(
    scored: ScoredTrajectory,
    prompt: str,
    tokenizer: "PreTrainedTokenizerBase",
    candidates: set[int],
) -> dict[str, object]:
    """Returns what all records have; ``texts`` has those of ``candidates`` too."""
    trajectory, signal = scored.trajectory, scored.signal
    ids = sorted({*trajectory.response_ids.tolist(), *candidates})
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
