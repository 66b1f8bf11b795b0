"""A benchmark runs on rollout engines: a model directory and rows go in, avg@n and pass@k come out."""

import asyncio
from collections.abc import Callable

from eopd.config import (
    BenchmarkConfig,
    ClusterConfig,
    PromptsConfig,
    RolloutConfig,
    StudentConfig,
)
from eopd.config.prompts import names_of
from eopd.evaluation.benchmarks import BenchmarkResult, run_benchmark
from eopd.hub import model_directory
from eopd.preflight import pin_model, pin_parts, require_answers, require_model
from eopd.preflight.options import require_vllm_options
from eopd.prompts import PromptSet
from eopd.rewards.graders import open_grader
from eopd.runtime import cluster
from eopd.runtime.placement import plan_rollout
from eopd.runtime.supervisor import fetch, rollout_engines
from eopd.tokenizer import load_tokenizer


def evaluate_model(
    student: StudentConfig,
    rollout: RolloutConfig,
    prompts: PromptsConfig,
    benchmark: BenchmarkConfig,
    seed: int,
    config: ClusterConfig,
    log: Callable[[str], None],
) -> tuple[BenchmarkResult, dict[str, str]]:
    """Runs one benchmark, whose prompts are rendered as ``prompts`` says; ``log`` is called with
    notes on the data, and with what becomes of engines.

    Returns:
        Its result, and what that is of: ``model`` and ``data`` with the commit behind a name of the
        Hub, and a path or another name as it was given.

    Raises:
        ConfigError: the model or the data is missing, a row has no answer that the grader can
            read, or vLLM has no such option.
        RunFailedError: more engines were lost than ``config`` allows.
    """
    require_vllm_options("--vllm", rollout.vllm)
    longest = prompts.max_tokens + rollout.max_response_tokens
    model = pin_model("MODEL", student.model, {}, weights=True)
    student, directory = student.model_copy(update={"model": model}), model_directory(model)
    require_model("MODEL", directory, num_tokens=longest)
    tokenizer = load_tokenizer(directory)
    parts = pin_parts("DATA", benchmark.data, {})
    data = PromptSet.load(parts, prompts, tokenizer, key="DATA")
    require_answers(data, benchmark.grader, "--grader")
    for note in data.notes:
        log(f"note: {note}")

    async def run() -> BenchmarkResult:
        async with rollout_engines(student, rollout, longest, config, log) as engines:
            return await run_benchmark(
                engines,
                data.prompts,
                lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
                grader,
                benchmark,
                fetch=fetch,
                seed=seed,
                max_tokens=rollout.max_response_tokens,
            )

    with open_grader(benchmark.grader, key="--grader") as grader, cluster.connect(config):
        cluster.require_room([plan_rollout(rollout)], config)
        result = asyncio.run(run())

    return result, {"model": model, "data": names_of(parts)}
