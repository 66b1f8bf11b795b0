"""``eopd eval`` samples answers, grades them, and prints the scores."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from eopd.cli.like import Like, note_of_others, over_those_of_the_run
from eopd.cli.mappings import read_mapping
from eopd.cli.paths import require_file
from eopd.cli.scores import score_lines, score_record
from eopd.config import (
    BenchmarkConfig,
    ClusterConfig,
    ConfigError,
    PromptsConfig,
    RolloutConfig,
    StudentConfig,
    make_section,
)
from eopd.config.benchmark import ks_of
from eopd.config.processor import chosen

PARALLEL: Final = frozenset({"tensor_parallel_size", "pipeline_parallel_size"})
OPTION_OF: Final = {
    "model": "MODEL",
    "data": "DATA",
    "held_out": "DATA",
    "samples": "--n",
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
    list[int] | None,
    typer.Option(
        "--k",
        help="Report pass@k; may be given more than once. Else 1, 2, 4 and so on below n, and n.",
    ),
]
_Temperature = Annotated[float, typer.Option(min=0.01, help="Samples come from the softmax at it.")]
_MaxResponseTokens = Annotated[int, typer.Option(min=1, help="Longer answers are cut.")]
_Template = Annotated[Literal["chat", "none"], typer.Option(help="How prompts are rendered.")]
_TopP = Annotated[
    float, typer.Option(help="Samples come from the likeliest tokens of this probability.")
]
_Stop = Annotated[
    list[str] | None, typer.Option(help="A text that ends an answer; may be given more than once.")
]
_TemplateOptions = Annotated[
    str,
    typer.Option(help="Options of the chat template as YAML, e.g. '{enable_thinking: false}'."),
]
_Columns = Annotated[
    list[str] | None,
    typer.Option(help="prompt=question: a column with another name; may be given more than once."),
]
_System = Annotated[str | None, typer.Option(help="A system message for prompts without one.")]
_MaxPromptTokens = Annotated[int, typer.Option(min=1, help="A longer prompt is an error.")]
_Suffix = Annotated[str, typer.Option(help="Appended to the last user text of every prompt.")]
_Engines = Annotated[int, typer.Option(min=1, help="Engines that write side by side.")]
_Threads = Annotated[int, typer.Option(min=1, help="CPU threads of one engine.")]
_Gpus = Annotated[float, typer.Option(min=0.0, help="GPUs of one engine.")]
_Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=0.001,
        help="Seconds that an engine has for one answer; one that takes longer is lost, and wrong.",
    ),
]
_Vllm = Annotated[
    list[str] | None,
    typer.Option(
        callback=over_those_of_the_run,
        help="max_num_seqs=64: an option of vLLM's engine; may be given more than once.",
    ),
]
_Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Precision; auto takes what the machine is fast in."),
]
_Seed = Annotated[
    int, typer.Option(min=0, help="The same seed gives every sample the same seed again.")
]
_Output = Annotated[Path | None, typer.Option(help="Write every answer and verdict as JSONL.")]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with every number, and nothing else.")
]


def evaluate(
    model: _Model,
    data: _Data,
    like: Like = None,
    grader: _Grader = "exact",
    n: _N = 8,
    k: _K = None,
    temperature: _Temperature = 1.0,
    top_p: _TopP = 1.0,
    stop: _Stop = None,
    max_response_tokens: _MaxResponseTokens = 1024,
    template: _Template = "chat",
    template_options: _TemplateOptions = "{}",
    columns: _Columns = None,
    system: _System = None,
    suffix: _Suffix = "",
    max_prompt_tokens: _MaxPromptTokens = 1024,
    engines: _Engines = 1,
    threads: _Threads = 2,
    gpus: _Gpus = 0.0,
    timeout: _Timeout = 1800.0,
    vllm: _Vllm = None,
    dtype: _Dtype = "auto",
    seed: _Seed = 0,
    output: _Output = None,
    as_json: _Json = False,
) -> None:
    """Sample answers and grade them: avg@n and pass@k with errors, and a count of every verdict."""
    ks = _ks(k, n)
    if output is not None:
        require_file("--output", output)

    asking: dict[str, object] = {"template": template, "suffix": suffix, "system": system}
    asking |= {"max_tokens": max_prompt_tokens}
    prompts = _prompts(data, template_options, columns or [], asking)
    writing: dict[str, object] = {"engines": engines, "threads": threads, "timeout_s": timeout}
    writing |= {"max_response_tokens": max_response_tokens}
    rollout = _rollout(vllm or [], gpus, writing)
    student = chosen(make_section(StudentConfig, OPTION_OF, model=model, dtype=dtype), gpus=gpus)

    sampling = {"samples": n, "temperature": temperature, "top_p": top_p, "stop": stop or ()}
    benchmark = make_section(
        BenchmarkConfig, OPTION_OF, name="eval", data=data, grader=grader, **sampling
    )

    settings = _settings(student, rollout, prompts, benchmark) | {"k": list(ks), "seed": seed}
    if like is None and (note := note_of_others(model, settings)):
        typer.echo(f"note: {note}", err=True)

    from eopd.runtime.evaluate import evaluate_model

    result, pinned = evaluate_model(
        student, rollout, prompts, benchmark, seed, ClusterConfig(), partial(typer.echo, err=True)
    )
    record = score_record(result, n, ks, settings) | {"pinned": pinned}
    lines = [json.dumps(record, allow_nan=False)] if as_json else score_lines(result, n, ks)
    typer.echo("\n".join(lines))
    if output is not None:
        result.write_prompts(output)


def _ks(ks: Sequence[int] | None, n: int) -> Sequence[int]:
    wanted = ks or ks_of(n)
    if wrong := [k for k in wanted if not 1 <= k <= n]:
        raise ConfigError(f"--k {wrong[0]}: must be between 1 and --n {n}")

    return wanted


def _prompts(
    data: str, template_options: str, columns: Sequence[str], values: Mapping[str, object]
) -> PromptsConfig:
    example = "{enable_thinking: false}"
    options = read_mapping("--template-options", [template_options], PromptsConfig, example)
    names = read_mapping("--columns", columns, PromptsConfig, "{prompt: question}")
    mappings = {"template_options": options, "columns": names}

    return make_section(PromptsConfig, OPTION_OF, data=data, held_out=data, **mappings, **values)


def _rollout(vllm: Sequence[str], gpus: float, values: Mapping[str, object]) -> RolloutConfig:
    options = read_mapping("--vllm", vllm, RolloutConfig, "{max_num_seqs: 64}")
    if gpus > 1.0 and gpus.is_integer() and not options.keys() & PARALLEL:
        raise ConfigError(
            f"--gpus {gpus:g}: an engine here has one GPU at most; write "
            f"--engines {gpus:g} --gpus 1"
        )

    return make_section(RolloutConfig, OPTION_OF, gpus=gpus, vllm=options, **values)


def _settings(
    student: StudentConfig,
    rollout: RolloutConfig,
    prompts: PromptsConfig,
    benchmark: BenchmarkConfig,
) -> dict[str, object]:
    """Returns what the numbers hang on besides k and the seed, by the names of the options."""
    return {
        "model": str(student.model),
        "data": benchmark.data[0].name,
        "grader": benchmark.grader,
        "n": benchmark.samples,
        "temperature": benchmark.temperature,
        "top_p": benchmark.top_p,
        "stop": list(benchmark.stop),
        "max_response_tokens": rollout.max_response_tokens,
        "template": prompts.template,
        "template_options": prompts.template_options,
        "columns": prompts.columns,
        "system": prompts.system,
        "suffix": prompts.suffix,
        "max_prompt_tokens": prompts.max_tokens,
        "engines": rollout.engines,
        "gpus": rollout.gpus,
        "vllm": rollout.vllm,
        "dtype": student.dtype,
    }
