"""What to change where something does not fit: each change is planned again, and said if it fits then.

A change is one override or several, as ``--set`` takes them, so that what is said can be written as
it stands; one that the config refuses is not said.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Final

from eopd.config import Config, ConfigError
from eopd.config.load import change_config
from eopd.planning.needs import Hardware, Models, Need, needs_of, split_of

_STEP: Final = 256  # tokens, in which a token budget is lowered
_MOST_RANKS: Final = 64
_STAGES: Final = (1, 2, 3)
_WORKERS: Final = (2, 4, 8)
_CHECKPOINTING: Final = "learner.activation_checkpointing=true"

Change = tuple[str, ...]  # overrides
Fitting = Callable[[Change], Need | None]  # what a role needs under a change, where it fits then


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

        fitting = cache(partial(_fitting, config, models, hardware, need.key))
        if need.key == "learner":
            found += _for_learner(config, fitting)
        else:
            found += _for_engine(config, need, fitting)

    return found


def _fitting(
    config: Config, models: Models, hardware: Hardware, key: str, change: Change
) -> Need | None:
    """Returns what a role needs under a change; None where it does not fit, or the config refuses
    the change.
    """
    try:
        changed = change_config(config, change)
    except ConfigError:
        return None

    need = next(need for need in needs_of(changed, models, hardware) if need.key == key)
    return need if need.fits else None


def _for_learner(config: Config, fitting: Fitting) -> list[str]:
    who = "A learner rank"
    if sentences := list(_sentences(who, _learner_changes(config, fitting), fitting)):
        return sentences

    several = next(_sentences(who, _several_changes(config, fitting), fitting), None)
    return [
        several
        or f"{who} does not fit on up to {_MOST_RANKS} ranks, with activations computed again and "
        "the optimiser in host memory: train adapters (student.lora: true), or take larger GPUs."
    ]


def _learner_changes(config: Config, fitting: Fitting) -> Iterator[Change]:
    """Yields single changes, the cheapest in time first."""
    learner = config.learner
    if (budget := _largest_budget(config, fitting)) is not None:
        yield (_budget(budget),)

    if not learner.activation_checkpointing:
        yield (_CHECKPOINTING,)

    if learner.ranks > 1:
        higher = [stage for stage in _STAGES if stage > learner.chosen_zero_stage]
        yield from ((f"learner.zero_stage={stage}",) for stage in higher)

    yield from _offloaded(config)
    yield from _more_ranks(config, fitting)


def _several_changes(config: Config, fitting: Fitting) -> Iterator[Change]:
    """Yields changes of which each has those of the one before it; offloading goes before ranks."""
    both = (_CHECKPOINTING, _budget(_least_budget(config)))
    yield both[:1]
    yield both
    yield from (both + more for more in _offloaded(config))
    yield from _more_ranks(config, fitting, both)


def _offloaded(config: Config) -> Iterator[Change]:
    """Yields the change that moves the optimiser into host memory, unless it is there."""
    learner = config.learner
    if not learner.offloaded:
        offload = "learner.deepspeed.zero_optimization.offload_optimizer={device: cpu}"
        yield (offload,) if learner.chosen_zero_stage else (offload, "learner.zero_stage=1")


def _more_ranks(config: Config, fitting: Fitting, before: Change = ()) -> Iterator[Change]:
    """Yields the least ranks that fit, at the present stage or the least higher one."""
    ranks = config.learner.ranks
    while (ranks := 2 * ranks) <= _MOST_RANKS:
        for stage in _STAGES:
            stage = max(config.learner.chosen_zero_stage, stage)
            change = (*before, f"learner.ranks={ranks}", f"learner.zero_stage={stage}")
            if fitting(change):
                yield change
                return


def _largest_budget(config: Config, fitting: Fitting) -> int | None:
    """Returns the most tokens below the present budget that fit, in steps of 256, or the fewest that
    hold the longest trajectory; None where not even those fit.
    """
    least = _least_budget(config)
    budgets = range(-(-least // _STEP) * _STEP, config.learner.token_budget + 1, _STEP)
    number = bisect_left(budgets, True, key=lambda budget: fitting((_budget(budget),)) is None)
    largest = budgets[number - 1] if number else least
    return largest if fitting((_budget(largest),)) else None


def _least_budget(config: Config) -> int:
    return config.prompts.max_tokens + config.max_response_tokens


def _budget(tokens: int) -> str:
    return f"learner.token_budget={tokens}"


def _for_engine(config: Config, need: Need, fitting: Fitting) -> list[str]:
    """Returns what makes an engine or a replica fit: more of its GPU, or more GPUs."""
    who = f"A {need.role}"
    sentence = next(_sentences(who, _engine_changes(config, need), fitting), None)
    return [
        sentence
        or f"{who} does not fit on {_WORKERS[-1]} GPUs either: take a smaller model or larger GPUs."
    ]


def _engine_changes(config: Config, need: Need) -> Iterator[Change]:
    key = need.key
    section = config.rollout if key == "rollout" else config.teachers[int(key.partition(".")[2])]
    if section.gpus < 1.0:
        share = round(0.9 * section.gpus, 2)
        yield (f"{key}.vllm.gpu_memory_utilization={share:g}",)
        yield (f"{key}.gpus=1",)

    workers, stages = split_of(section)
    for more in (more for more in _WORKERS if more > workers):
        yield f"{key}.vllm.tensor_parallel_size={more}", f"{key}.gpus={more * stages}"


def _sentences(who: str, changes: Iterable[Change], fitting: Fitting) -> Iterator[str]:
    """Yields a sentence for each change with which it fits."""
    for change in changes:
        if (need := fitting(change)) is not None:
            text = " with ".join(override.replace("=", ": ", 1) for override in change)
            sizes = f"{need.device_bytes / 1e9:.1f} of {(need.limit or 0) / 1e9:.1f} GB"
            yield f"{who} fits with {text}: {sizes} of each GPU."
