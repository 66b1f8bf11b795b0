"""What is ``auto`` in a config is chosen when it is loaded: one pass, and plain values from then on.

    loaded ─ with_choices ─▶ dtypes (``processor.py``), then the ZeRO stage, each with its reason
    resumed, forked ─ with_choices_of ─▶ what was chosen here becomes what its checkpoints are of

Left out, since no one rule fits: threads and chunk sizes, as how much of a machine or of a GPU's
memory is a role's own is not known here; vLLM chooses the limits of an engine's batches itself.
"""

from collections.abc import Collection

from eopd.config.learner import LOWEST_STAGE, ZeroStage
from eopd.config.processor import ChosenDtype, dtype_notes, with_dtypes, with_student_dtype_of
from eopd.config.root import Config


def choose_zero_stage(
    *, ranks: int, dtype: ChosenDtype, offloaded: Collection[str] = ()
) -> tuple[ZeroStage, str]:
    """Chooses the ZeRO stage of a learner, and says why, as half a sentence.

    On one rank there is nothing to shard, and the faster of 0 and 1 is taken. With a student of
    99 M on 8 x (32 + 32) tokens and two cores, stage 1 trained 302 tokens/s in bfloat16 and 0
    trained 259; in float32, 0 trained 199 and 1 trained 150 (``tests/bench/bench_learner.py``). An
    H200 in bfloat16 had the same order: 15,615 to 14,289. Stage 0 also sums gradients in the
    student's own type, which is exact enough in float32 alone. Several ranks shard the optimiser's
    state, the largest part of what a rank holds. Stages 2 and 3 save more memory for more traffic:
    a user who needs that asks for it.

    Args:
        ranks: of the gang.
        dtype: of the student.
        offloaded: ``offload_optimizer`` and ``offload_param``, where DeepSpeed is told to.
    """
    if offloaded:
        name = max(offloaded, key=lambda name: LOWEST_STAGE[name])
        return LOWEST_STAGE[name], f"the lowest with {name}"

    if ranks > 1:
        return 1, f"shards the optimiser's state over {ranks} ranks"

    return (0 if dtype == "float32" else 1), f"the fastest on one rank in {dtype}"


def with_choices(config: Config) -> Config:
    """Returns the config with all that is ``auto`` chosen."""
    config = with_dtypes(config)
    return config if config.learner.zero_stage != "auto" else _with_stage(config, *_choice(config))


def with_choices_of(before: Config, now: Config) -> Config:
    """Returns a config that continues another one, with the student's precision and the ZeRO stage of
    the latter where ``auto`` chose them here: machines and ranks differ, checkpoints do not.

    A stage at which nothing can be offloaded is not kept, where that is asked for now.
    """
    now = with_student_dtype_of(before, now)
    if now.learner.zero_stage_reason is None:
        return now

    stage, reason = _choice(now)
    kept = before.learner.chosen_zero_stage
    if kept < max((LOWEST_STAGE[name] for name in now.learner.offloaded), default=0):
        return now

    return _with_stage(now, kept, reason if kept == stage else "that of the checkpoints")


def choice_notes(config: Config) -> list[str]:
    """Returns notes on what was chosen in a loaded config and why, and on what is slow."""
    learner = config.learner
    if learner.zero_stage_reason is None:
        return dtype_notes(config)

    stage = f"learner.zero_stage: {learner.zero_stage} ({learner.zero_stage_reason})"
    return [*dtype_notes(config), stage]


def _choice(config: Config) -> tuple[ZeroStage, str]:
    learner = config.learner
    return choose_zero_stage(
        ranks=learner.ranks, dtype=config.student.chosen_dtype, offloaded=learner.offloaded
    )


def _with_stage(config: Config, stage: ZeroStage, reason: str) -> Config:
    chosen = {"zero_stage": stage, "zero_stage_reason": f"auto: {reason}"}
    return config.model_copy(update={"learner": config.learner.model_copy(update=chosen)})
