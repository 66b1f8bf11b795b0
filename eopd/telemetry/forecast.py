"""How long a run will take, told once it is known, and what to change when that is far longer
than meant.
"""

from typing import Final

from eopd.run.record import Row

AFTER_STEPS: Final = 3  # of this process: the first one warms everything up
FAR_LONGER: Final = 2.0  # times ``run.expected_minutes``

_ADVICE: Final = {
    "train": "lower rollout.max_response_tokens or flow.batch_prompts, or check that "
    "student.dtype is fast here (auto)",
    "generate": "lower rollout.max_response_tokens, or raise rollout.threads or rollout.engines",
    "score": "raise teachers[].threads or replicas, or set teachers[].head_dtype: model",
    "weights": "lower weights.verify_every to 0, or train adapters (student.lora)",
}


def forecast(
    row: Row, *, spent_s: float, step_s: float, batches: int, expected_minutes: float | None
) -> str:
    """Returns a sentence on how long the run will take, and advice where that is more than
    ``FAR_LONGER`` times as long as expected.

    Args:
        row: of the last step.
        spent_s: seconds since the start, of this process.
        step_s: seconds from one step to the next.
        batches: of the whole run.
        expected_minutes: ``run.expected_minutes``.
    """
    steps = batches - int(row["eopd_step"])
    minutes = (spent_s + step_s * steps) / 60
    duration = _duration(minutes)
    sentence = f"this run will take about {duration} in all: {steps} more steps of {step_s:.1f} s"
    if expected_minutes is None or minutes <= FAR_LONGER * expected_minutes:
        return sentence

    stage = max(_ADVICE, key=lambda name: row.get(f"eopd_{name}_seconds", 0.0))
    share = row.get(f"eopd_{stage}_seconds", 0.0) / max(row["eopd_step_seconds"], 1e-9)

    return (
        f"{sentence}. It was written to take {_duration(expected_minutes)}. Most of a step is "
        f"{stage} ({share:.0%}): {_ADVICE[stage]}; or lower run.batches"
    )


def _duration(minutes: float) -> str:
    if minutes < 1.5:
        return "a minute"

    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
