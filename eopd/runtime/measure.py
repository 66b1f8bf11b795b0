"""``eopd measure``: the held-out numbers of a checkpoint, by actors of its own."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from eopd.config import Config, TelemetryConfig
from eopd.config.load import change_config
from eopd.evaluation.held_out import measure_held_out
from eopd.evaluation.summary import measurements
from eopd.preflight.inputs import prepare_held_out
from eopd.roles import WorkerDownError
from eopd.run.changes import changes, kind_of
from eopd.run.checkpoint import step_of
from eopd.run.directory import RunDirectory
from eopd.run.record import Measurement
from eopd.runtime import cluster
from eopd.runtime.placement import plan
from eopd.runtime.supervisor import start_workers
from eopd.types import PromptSample, RunFailedError


def measure_checkpoint(
    run: Path, step: int | None, overrides: Sequence[str], say: Callable[[str], None]
) -> Mapping[str, Measurement]:
    """Measures the student of a checkpoint as the run measured it at that step, and leaves the run as
    it is.

    Args:
        run: the run directory.
        step: of the checkpoint; else the newest that is whole.
        overrides: ``a.b=c`` over the config, as where another machine measures.
        say: is called with messages for people.

    Returns:
        The numbers, by the names of ``evaluation.summary.measurements``.

    Raises:
        ConfigError: this is no run, it has no such checkpoint, or the run's inputs are gone.
        RunFailedError: the actors did not come up, or no prompt could be measured, or a
            worker was lost.
    """
    directory = RunDirectory(run)
    checkpoint = directory.checkpoint(step)
    config = change_config(_config_of(directory, step_of(checkpoint)), overrides)
    with TemporaryDirectory(prefix="eopd-measure-") as scratch:
        # the run may be under way, and serve its metrics; or nobody may write there
        apart = config.run.model_copy(update={"directory": Path(scratch), "upload": None})
        update = {"run": apart, "telemetry": TelemetryConfig(port=None)}
        return _measure_apart(config.model_copy(update=update), checkpoint, say)


def _config_of(directory: RunDirectory, step: int) -> Config:
    """Returns the present config, which says where everything lies and runs, with what made the numbers
    at a step.
    """
    now, then = directory.config_of_student(step), directory.config_at(step)
    vllm = [(key, value) for key, value in now.rollout.vllm.items() if not _is_noted(key)]
    vllm += [(key, value) for key, value in then.rollout.vllm.items() if _is_noted(key)]
    rollout: dict[str, object] = {
        "temperature": then.rollout.temperature,
        "max_response_tokens": then.rollout.max_response_tokens,
        "vllm": dict(vllm),
    }
    made: dict[str, object] = {
        "loss": then.loss,
        "evaluation": then.evaluation,
        "rollout": now.rollout.model_copy(update=rollout),
    }
    if any(
        change.kind == "noted" and change.key.startswith("teachers.")
        for change in changes(then, now)
    ):
        made["teachers"] = then.teachers

    return now.model_copy(update=made)


def _is_noted(option: str) -> bool:
    return kind_of(f"rollout.vllm.{option}") == "noted"


def _measure_apart(
    config: Config, checkpoint: Path, say: Callable[[str], None]
) -> Mapping[str, Measurement]:
    prompts = prepare_held_out(config).prompts
    with cluster.connect(config.cluster):
        cluster.require_room(plan(config), config.cluster, say)
        try:
            return asyncio.run(_measure(config, prompts, checkpoint, say))
        except WorkerDownError as error:
            raise RunFailedError(f"a worker was lost: {error}") from error


async def _measure(
    config: Config, prompts: Sequence[PromptSample], checkpoint: Path, say: Callable[[str], None]
) -> Mapping[str, Measurement]:
    logs = cluster.log_directory()
    async with start_workers(config, 0, prompts, say, logs=logs) as workers:
        await workers.learner.load(checkpoint / "learner")
        await workers.channel.publish(await workers.learner.version())
        measured = await measure_held_out(
            workers.engines,
            workers.teacher,
            workers.learner,
            prompts,
            config,
            when=f"after step {step_of(checkpoint)}",
            say=say,
            doing=lambda text: None,
        )

    if measured is None:
        raise RunFailedError("nothing was measured; the cause is above")

    stats, _ = measured
    return measurements(stats.by_prompt)
