"""``eopd eval`` samples answers, grades them, and prints the scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, cast

import typer

from eopd.cli.paths import require_file
from eopd.config import (
    ClusterConfig,
    ConfigError,
    PromptsConfig,
    RolloutConfig,
    StudentConfig,
    make_section,
)
from eopd.config.document import DocumentError, read_value
from eopd.config.processor import chosen
from eopd.config.shape import shape
from eopd.evaluation.benchmarks import BenchmarkResult, PromptResult
from eopd.rewards.verdict import Verdict

VERDICT_WORDS = {
    Verdict.CORRECT: "right",
    Verdict.WRONG: "wrong",
    Verdict.NO_ANSWER: "without an answer",
    Verdict.TIMEOUT: "timed out",
    Verdict.ERROR: "not graded",
}
IDS_SHOWN = 5
OPTION_OF: Final = {
    "model": "MODEL",
    "data": "DATA",
    "held_out": "DATA",
    "max_tokens": "--max-prompt-tokens",
}


# The arguments and options of ``eopd eval``.
_Model = Annotated[
    str,
    typer.Argument(help="A Hugging Face directory, e.g. runs/NAME/hf, or a model's OWNER/NAME."),
]
_Data = Annotated[
    str,
    typer.Argument(
        help="Rows with prompt (or messages) and answer: .jsonl, .parquet, or a data set's name."
    ),
]
_Grader = Annotated[
    str,
    typer.Option(
        help="How an answer is judged: exact, math, or your function as package.module:name."
    ),
]
_N = Annotated[int, typer.Option("--n", min=1, help="Samples per prompt.")]
_K = Annotated[
    list[int] | None, typer.Option("--k", help="Report pass@k; may be given more than once.")
]
_Temperature = Annotated[float, typer.Option(min=0.01, help="Samples come from the softmax at it.")]
_MaxResponseTokens = Annotated[int, typer.Option(min=1, help="Longer answers are cut.")]
_Template = Annotated[Literal["chat", "none"], typer.Option(help="How prompts are rendered.")]
_TemplateOptions = Annotated[
    str,
    typer.Option(help="Options of the chat template as YAML, e.g. '{enable_thinking: false}'."),
]
_MaxPromptTokens = Annotated[int, typer.Option(min=1, help="A longer prompt is an error.")]
_Suffix = Annotated[str, typer.Option(help="Appended to the last user text of every prompt.")]
_Engines = Annotated[int, typer.Option(min=1, help="Engines that write side by side.")]
_Threads = Annotated[int, typer.Option(min=1, help="CPU threads of one engine.")]
_Gpus = Annotated[float, typer.Option(min=0.0, help="GPUs of one engine.")]
_Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Precision; auto takes what the machine is fast in."),
]
_Seed = Annotated[
    int, typer.Option(min=0, help="The same seed gives every sample the same seed again.")
]
_Output = Annotated[Path | None, typer.Option(help="Write every answer and verdict as JSONL.")]


def evaluate(
    model: _Model,
    data: _Data,
    grader: _Grader = "exact",
    n: _N = 8,
    k: _K = None,
    temperature: _Temperature = 1.0,
    max_response_tokens: _MaxResponseTokens = 1024,
    template: _Template = "chat",
    template_options: _TemplateOptions = "{}",
    max_prompt_tokens: _MaxPromptTokens = 1024,
    suffix: _Suffix = "",
    engines: _Engines = 1,
    threads: _Threads = 2,
    gpus: _Gpus = 0.0,
    dtype: _Dtype = "auto",
    seed: _Seed = 0,
    output: _Output = None,
) -> None:
    """Sample answers and grade them: avg@n and pass@k, with standard errors, and a count of
    every verdict.
    """
    ks = k or sorted({1, n})
    if wrong := [value for value in ks if not 1 <= value <= n]:
        raise ConfigError(f"--k {wrong[0]}: must be between 1 and --n {n}")

    if gpus > 1.0 and gpus.is_integer():
        raise ConfigError(
            f"--gpus {gpus:g}: an engine here has one GPU at most; write "
            f"--engines {gpus:g} --gpus 1"
        )

    if output is not None:
        require_file("--output", output)

    prompts = {"template": template, "max_tokens": max_prompt_tokens, "suffix": suffix}
    prompts_config = _prompts(data, template_options, prompts)
    rollout = {"temperature": temperature, "max_response_tokens": max_response_tokens}

    from eopd.runtime.evaluate import Benchmark, evaluate_model

    result = evaluate_model(
        chosen(make_section(StudentConfig, OPTION_OF, model=model, dtype=dtype), gpus=gpus),
        make_section(
            RolloutConfig, OPTION_OF, engines=engines, gpus=gpus, threads=threads, **rollout
        ),
        Benchmark(prompts=prompts_config, grader=grader, samples=n, ks=ks, seed=seed),
        ClusterConfig(),
        lambda note: typer.echo(note, err=True),
    )
    for line in _lines(result, n):
        typer.echo(line)

    if output is not None:
        result.write_prompts(output)


def _prompts(data: str, options: str, values: Mapping[str, object]) -> PromptsConfig:
    must = f"--template-options {options}: must be a YAML mapping, e.g. {{enable_thinking: false}}"
    try:
        tree = read_value(options)
    except DocumentError as error:
        raise ConfigError(f"{must}; this {error}") from None

    if not isinstance(tree, dict):
        raise ConfigError(must)

    shaped, faults = shape({"template_options": tree, **values}, PromptsConfig)
    if faults:
        lines = [
            f"--template-options.{'.'.join(place[1:])}: {fault}" for place, fault in faults.items()
        ]
        raise ConfigError("\n".join(lines))

    return make_section(
        PromptsConfig, OPTION_OF, data=data, held_out=data, **cast(Mapping[str, object], shaped)
    )


def _failed(prompt: PromptResult) -> bool:
    """Tells whether the grader failed on an answer."""
    return any(answer.verdict is Verdict.ERROR for answer in prompt.answers)


def _lines(result: BenchmarkResult, n: int) -> Sequence[str]:
    """Returns the scores, and the counts behind them, line by line."""
    width = len(f"pass@{max(result.pass_at_k, default=0)}")
    scores = {f"avg@{n}": result.avg_at_n} | {
        f"pass@{k}": estimate for k, estimate in result.pass_at_k.items()
    }
    lines = [
        f"{name:<{width}}  {score.mean:.4f} +- {score.standard_error:.4f}"
        for name, score in scores.items()
    ]
    lines.append(
        f"{len(result.prompts)} prompts, {result.mean_response_tokens:.1f} tokens an answer, "
        f"{result.truncation_rate:.1%} truncated, {result.num_lost} lost"
    )
    counts = ", ".join(
        f"{number} {VERDICT_WORDS[verdict]}" for verdict, number in result.num_verdicts.items()
    )
    lines.append(f"{sum(result.num_verdicts.values())} answers: {counts}")

    failed = [prompt.prompt_id for prompt in result.prompts if _failed(prompt)]
    if failed:
        more = f" and {len(failed) - IDS_SHOWN} more" if len(failed) > IDS_SHOWN else ""
        lines.append(
            f"not graded: prompts {', '.join(failed[:IDS_SHOWN])}{more}: the grader failed, "
            "or cannot read the accepted answer; these count as wrong"
        )

    return lines
