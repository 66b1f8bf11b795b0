"""What to change where something does not fit: each change is planned again, and said if it fits then."""

from collections.abc import Callable, Iterator
from typing import Final

from eopd.config import Config
from eopd.config.learner import ZeroStage
from eopd.planning.architecture import Architecture
from eopd.planning.needs import (
    Hardware,
    Models,
    Need,
    learner_need,
    rollout_need,
    split_of,
    teacher_need,
)

_STEP: Final = 256  # tokens, in which a token budget is lowered
_MOST_RANKS: Final = 64
_STAGES: Final[tuple[ZeroStage, ...]] = (1, 2, 3)
_WORKERS: Final = (2, 4, 8)

Change = tuple[str, Config]  # what to write, and the config with it


def advice(
    config: Config, models: Models, hardware: Hardware, needs: tuple[Need, ...]
) -> list[str]:
    """Returns a sentence for each change that makes a role fit which does not; each names a key and a
    value. Where no single one does, the sentence has several; where those do not either, it says so.
    """
    found: list[str] = []
    for need in needs:
        if need.fits is not False:
            continue

        if need.key == "learner":
            found += _for_learner(config, models.student, hardware)
        else:
            found += _for_engine(config, models, hardware, need)

    return found


def _for_learner(config: Config, model: Architecture, hardware: Hardware) -> list[str]:
    def need_of(changed: Config) -> Need:
        return learner_need(changed, model, hardware)

    sentences = [
        _sentence("A learner rank", text, need_of(changed))
        for text, changed in _learner_changes(config, need_of)
        if need_of(changed).fits
    ]
    return sentences or [_together(config, need_of)]


def _learner_changes(config: Config, need_of: Callable[[Config], Need]) -> Iterator[Change]:
    """Yields single changes, the cheapest in time first."""
    learner = config.learner
    budget = _largest_budget(config, need_of)
    if budget is not None:
        yield f"learner.token_budget: {budget}", _with_learner(config, token_budget=budget)

    if not learner.activation_checkpointing:
        yield (
            "learner.activation_checkpointing: true",
            _with_learner(config, activation_checkpointing=True),
        )

    stage = learner.chosen_zero_stage
    if learner.ranks > 1:
        for higher in (higher for higher in _STAGES if higher > stage):
            yield f"learner.zero_stage: {higher}", _with_learner(config, zero_stage=higher)

    if not learner.offloaded:
        yield _offloaded(config)

    if more := _more_ranks(config, need_of):
        yield more


def _more_ranks(config: Config, need_of: Callable[[Config], Need]) -> Change | None:
    """Returns the least ranks that fit, at the present stage or the least higher one."""
    stages = [max(config.learner.chosen_zero_stage, stage) for stage in _STAGES]
    ranks = config.learner.ranks
    while (ranks := 2 * ranks) <= _MOST_RANKS:
        for stage in stages:
            changed = _with_learner(config, ranks=ranks, zero_stage=stage)
            if need_of(changed).fits:
                return f"learner.ranks: {ranks} with learner.zero_stage: {stage}", changed

    return None


def _largest_budget(config: Config, need_of: Callable[[Config], Need]) -> int | None:
    """Returns the most tokens below the present budget that fit, in steps of 256, or the fewest that
    hold the longest trajectory; None where not even those fit.
    """
    least = config.prompts.max_tokens + config.max_response_tokens
    first = -(-least // _STEP)
    steps = range(first, config.learner.token_budget // _STEP + 1)
    low, high = 0, len(steps)

    while low < high:  # the number of steps that fit
        middle = (low + high) // 2
        if need_of(_with_learner(config, token_budget=steps[middle] * _STEP)).fits:
            low = middle + 1
        else:
            high = middle

    if low:
        return steps[low - 1] * _STEP

    return least if need_of(_with_learner(config, token_budget=least)).fits else None


def _together(config: Config, need_of: Callable[[Config], Need]) -> str:
    """Returns a sentence of several changes, added one to another until a rank fits."""
    texts, changed = [], config
    least = config.prompts.max_tokens + config.max_response_tokens
    for text, values in (
        ("learner.activation_checkpointing: true", {"activation_checkpointing": True}),
        (f"learner.token_budget: {least}", {"token_budget": least}),
    ):
        texts.append(text)
        changed = _with_learner(changed, **values)
        if need_of(changed).fits:
            return _sentence("A learner rank", " with ".join(texts), need_of(changed))

    more = _more_ranks(changed, need_of)
    last = [more] if more else []
    if not changed.learner.offloaded:
        offloaded = _offloaded(changed)
        last = [offloaded] if need_of(offloaded[1]).fits else last

    for text, final in last:
        return _sentence("A learner rank", " with ".join([*texts, text]), need_of(final))

    return (
        f"A learner rank does not fit on up to {_MOST_RANKS} ranks, with activations computed again and "
        "the optimiser in host memory: train adapters (student.lora: true), or take larger GPUs."
    )


def _offloaded(config: Config) -> Change:
    learner = config.learner
    zero = learner.deepspeed.get("zero_optimization")
    named = dict(zero) if isinstance(zero, dict) else {}
    native = {
        **learner.deepspeed,
        "zero_optimization": {**named, "offload_optimizer": {"device": "cpu"}},
    }
    stage = max(learner.chosen_zero_stage, 1)
    text = "learner.deepspeed.zero_optimization.offload_optimizer: {device: cpu}"
    if stage != learner.chosen_zero_stage:
        text += f" and learner.zero_stage: {stage}"

    return text, _with_learner(config, deepspeed=native, zero_stage=stage)


def _with_learner(config: Config, **values: object) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update=values)})


def _for_engine(config: Config, models: Models, hardware: Hardware, need: Need) -> list[str]:
    """Returns what makes an engine or a replica fit: more of its GPU, or more GPUs."""

    def need_of(changed: Config) -> Need:
        if need.key == "rollout":
            return rollout_need(changed, models.student, hardware)

        number = int(need.key.partition(".")[2])
        model = models.teachers[config.teachers[number].name]
        return teacher_need(changed, number, model, hardware)

    who = f"A {need.role}"
    for text, changed in _engine_changes(config, need):
        changed_need = need_of(changed)
        if changed_need.fits:
            return [_sentence(who, text, changed_need)]

    return [
        f"{who} does not fit on {_WORKERS[-1]} GPUs either: take a smaller model or larger GPUs."
    ]


def _engine_changes(config: Config, need: Need) -> Iterator[Change]:
    number = None if need.key == "rollout" else int(need.key.partition(".")[2])
    section = config.rollout if number is None else config.teachers[number]

    def with_options(gpus: float, **options: object) -> Config:
        values = {"gpus": gpus, "vllm": {**section.vllm, **options}}
        if number is None:
            return config.model_copy(update={"rollout": config.rollout.model_copy(update=values)})

        teachers = list(config.teachers)
        teachers[number] = teachers[number].model_copy(update=values)
        return config.model_copy(update={"teachers": tuple(teachers)})

    if section.gpus < 1.0:
        share = round(0.9 * section.gpus, 2)
        text = f"{need.key}.vllm.gpu_memory_utilization: {share:g}"
        yield text, with_options(section.gpus, gpu_memory_utilization=share)

        yield f"{need.key}.gpus: 1", with_options(1.0)

    workers, stages = split_of(section)
    for more in (more for more in _WORKERS if more > workers):
        text = f"{need.key}.vllm.tensor_parallel_size: {more} with {need.key}.gpus: {more * stages}"
        yield text, with_options(float(more * stages), tensor_parallel_size=more)


def _sentence(who: str, text: str, need: Need) -> str:
    limit = need.limit or 0
    return f"{who} fits with {text}: {need.device_bytes / 1e9:.1f} of {limit / 1e9:.1f} GB of each GPU."
