"""What `eopd check` finds before anything starts: several teachers, their prompts, and the
report of it.
"""

import json
import os
import re
import shutil
import sys
from typing import Literal

import fakes
import pytest
from pydantic import ValidationError

from eopd import preflight
from eopd.config import ConfigError, load_config
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.preflight import environment
from eopd.preflight.declared import Declarations
from eopd.preflight.options import require_deepspeed_options, require_vllm_options
from eopd.prompts import PromptSet
from eopd.telemetry import plain

ROWS = [("a", "math"), ("b", "math"), ("c", "code"), ("d", "poems")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    for name, end in (
        ("student", "<|endoftext|>"),
        ("chat", "<|im_end|>"),
        ("base", "<|endoftext|>"),
    ):
        tokenizer = train_tokenizer(["a few words to cut into pieces"], 270)
        tokenizer.eos_token = end
        write_model(
            root / name,
            build_model("qwen3", tokenizer, seed=0, layers=1),
            tokenizer,
        )

    (root / "chat" / "chat_template.jinja").write_text("{{ messages }}<think>")
    for weights in (root / "base").glob("*.safetensors"):
        weights.unlink()

    for name in ("mute", "lost"):
        shutil.copytree(root / "student", root / name)

    for file in (root / "mute").glob("*token*"):
        file.unlink()

    described = json.loads((root / "lost" / "config.json").read_text())
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    (root / "lost" / "config.json").write_text(json.dumps(described | layers))
    lines = [json.dumps({"prompt": prompt, "source": source}) + "\n" for prompt, source in ROWS]
    too_long = json.dumps({"prompt": "word " * 99, "source": "math"})
    (root / "train.jsonl").write_text("".join([*lines, too_long]))
    (root / "held_out.jsonl").write_text(lines[0])
    chat = "replicas: 2, dtype: float32, eos_remap: {0: 2}, sources: [math, poems]"
    far = "backend: eopd, dtype: float32, server: {url: 'http://far:8000'}"
    data = f"data: {root}/train.jsonl, held_out: {root}/held_out.jsonl"
    fakes.write_config(
        root,
        batches=1,
        student=f"{{model: {root}/student, dtype: float32}}",
        teachers=(
            f"\n  - {{name: chat, model: {root}/chat, {chat}}}"
            f"\n  - {{name: far, model: {root}/base, {far}}}"
        ),
        prompts=f"{{{data}, max_tokens: 64, overlong: drop}}",
        flow="{batch_prompts: 1}",
    )

    return root


@pytest.fixture
def check(eopd, files, monkeypatch):
    monkeypatch.setattr(plain, "SLOW_S", 600.0)  # a busy machine says no more than another

    def run(*overrides: str) -> tuple[int, str]:
        options = []
        for override in overrides:
            options += ["--set", override.format(root=files)]

        done = eopd("check", files / "c.yaml", *options)
        assert not (files / "runs").exists()
        assert bool(done.out) != bool(done.err)
        shown = done.out or done.err
        return int(done.code or 0), shown.replace(str(files), "")

    return run


def test_the_report_says_what_every_teacher_shares_and_teaches(check):
    code, shown = check("cluster.cpus=8")
    assert code == 0
    tokens = shown.split("vocabulary  ")[1].split(" tokens")[0]
    assert shown.splitlines() == [
        "student /student",
        "teacher chat: /chat (2 x vllm)",
        f"  vocabulary  {tokens} tokens; rows of the heads: student {tokens}, teacher {tokens}",
        "  end tokens  student 0 <|endoftext|>; teacher 2 <|im_end|>",
        "  eos_remap   0 <|endoftext|> -> 2 <|im_end|>",
        "  prompts     3 to train, 1 held out",
        "  note        chat templates differ; that of the student is the one that may render prompts",
        "teacher far: /base (http://far:8000, which --live asks)",
        f"  vocabulary  {tokens} tokens; rows of the heads: student {tokens}, teacher {tokens}",
        "  end tokens  student 0 <|endoftext|>; teacher 0 <|endoftext|>",
        "  eos_remap   none",
        "  prompts     1 to train, 0 held out",
        "learner.zero_stage: 0 (auto: the fastest on one rank in float32)",
        "note: prompts.data: 1 of 5 rows: left out, longer than prompts.max_tokens 64",
        "note: checkpoint.every: 50 is above run.batches 1; the only one is at the end",
        "note: evaluation.prompts: 64 is above the 1 prompts of prompts.held_out; all of "
        "them are used",
        "note: prompts.held_out: 1 of its 1 prompts are in prompts.data too",
        "no mistake was found",
    ]


def test_the_report_says_which_precision_was_chosen_and_why(check):
    _, shown = check("student.dtype=auto", "teachers.1.dtype=auto")
    told = [line for line in shown.splitlines() if "dtype" in line]
    assert len(told) == 2
    assert told[0].startswith(("student.dtype: float32 (auto: ", "student.dtype: bfloat16 (auto: "))
    assert told[1] == "teachers.far.dtype: bfloat16 (auto: what most servers compute in)"


def test_the_report_has_the_share_of_every_part(check):
    train, held_out = "{{data: {root}/train.jsonl%s}}", "{{data: {root}/held_out.jsonl%s}}"
    told = {}
    for weights in (("", ""), (", weight: 0.1", ", weight: 0.3")):
        parts = ", ".join([train % weights[0], held_out % weights[1]])
        code, shown = check(f"prompts.data=[{parts}]", "prompts.held_out={root}/held_out.jsonl")
        assert code == 0
        told[weights] = [line for line in shown.splitlines() if line.startswith("part")]

    assert list(told.values()) == [
        [
            "part /train.jsonl: 4 prompts, 80.0% of training",
            "part /held_out.jsonl: 1 prompts, 20.0% of training",
        ],
        [
            "part /train.jsonl: 4 prompts, 25.0% of training",
            "part /held_out.jsonl: 1 prompts, 75.0% of training",
        ],
    ]


def test_training_and_held_out_prompts_are_taken_from_all_parts(files):
    train, held_out = f"{files}/train.jsonl", f"{files}/held_out.jsonl"
    weighted = f"{{data: {train}, weight: 1}}, {{data: {held_out}, weight: 2}}"
    overrides = [f"prompts.data=[{weighted}]", f"prompts.held_out=[{train}, {held_out}]"]
    config = load_config(files / "c.yaml", [*overrides, "rollout.samples_per_prompt=2"])
    prepared = preflight.prepare(config)
    order = prepared.order(config)
    issued = [order.at(issue)[0].prompt_id.split("/")[0] for issue in range(12)]
    assert "".join(issued) == "110011" * 2
    held = [prompt.prompt_id for prompt in prepared.held_out.prompts]
    assert held == ["0/1", "1/1", "0/2", "0/3", "0/4"]


def test_a_teacher_that_takes_no_system_message_is_named(files, tmp_path):
    strict = tmp_path / "strict"
    shutil.copytree(files / "chat", strict)
    (strict / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    template = ["teachers.0.template='{{ prompt }}'", "teachers.0.max_prompt_tokens=99"]
    overrides = ["prompts.system=Think.", *template]
    preflight.prepare(load_config(files / "c.yaml", overrides))
    with pytest.raises(ConfigError) as caught:
        preflight.prepare(load_config(files / "c.yaml", [*overrides, f"teachers.0.model={strict}"]))

    assert str(caught.value) == (
        "prompts.system: the teacher chat's chat template takes no system message (no system); "
        "leave it out (--system of eopd eval), or say it in prompts.suffix"
    )


def test_rows_that_stand_twice_are_noted(check, files):
    rows = (files / "train.jsonl").read_text().splitlines()[:2]
    text = "\n".join([*rows, *rows]).replace('"id"', '"was"')
    (files / "twice.jsonl").write_text(f"{text}\n")
    _, shown = check("prompts.data={root}/twice.jsonl")
    assert "note: prompts.data: 2 of its 4 prompts are copies of others" in shown


def test_a_teacher_that_is_the_student_is_noted_where_nothing_else_teaches(check):
    far = "backend: eopd, dtype: float32, server: {{url: 'http://far:8000'}}"
    same = "{{name: a, model: {root}/student}}"
    other = f"{{{{name: b, model: {{root}}/base, {far}}}}}"
    note = "note: teachers: all are student.model and read the same prompts"
    shared = ["student.dtype=float32", "teachers.0.dtype=float32"]
    assert note in check(f"teachers=[{same}]", *shared)[1]
    for told_more in (
        [f"teachers=[{same[:-2]}, sources: [chat, math]}}}}, {other}]"],
        [f"teachers=[{same}]", "teachers.0.temperature=0.5"],
        [f"teachers=[{same}]", "teachers.0.template='{{{{ prompt }}}} please'"],
    ):
        code, shown = check(*told_more, *shared)
        assert (code, note in shown) == (0, False), shown


def test_notes_compare_the_config_with_the_data(check):
    _, shown = check(
        "flow.batch_prompts=5",
        "checkpoint.every=1",
        "teachers.0.sources=[verse]",
        "cluster.cpus=9",
    )
    assert [line for line in shown.splitlines() if line.startswith("note")] == [
        "note: prompts.data: 1 of 5 rows: left out, longer than prompts.max_tokens 64",
        "note: flow.batch_prompts: 5 is above the 4 prompts of prompts.data; a batch holds "
        "some of them more than once",
        "note: evaluation.prompts: 64 is above the 1 prompts of prompts.held_out; all of "
        "them are used",
        "note: prompts.held_out: 1 of its 1 prompts are in prompts.data too",
        "note: teachers.chat: teaches nothing: no row has its sources",
    ]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["loss.gate=hard"], None),
        (["loss.gate.kind=quantile"], "loss.gate: quantile"),
        (
            ["learner.optimizer_steps_per_batch=2", "flow.batch_prompts=2"],
            "learner.optimizer_steps_per_batch above 1",
        ),
    ],
)
def test_what_needs_a_whole_batch_is_said(check, overrides, why):
    told = [line for line in check(*overrides)[1].splitlines() if "whole batch" in line]
    note = "the learner begins a step when its whole batch is there, because of"
    assert told == ([] if why is None else [f"{note} {why}"])


def test_threads_are_compared_with_the_cores_of_a_run_that_is_local(check, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    note = "note: learner.threads: 5 on a machine of 4 cores, which share its time"
    assert note in check("learner.threads=5")[1]
    assert ".threads" not in check("learner.threads=4")[1]
    assert ".threads" not in check("learner.threads=5", "cluster.address=auto")[1]


SERVED = "teachers.1.server={{url: 'http://far:8000', api_key_env: EOPD_TEST_KEY}}"


def test_the_key_of_a_server_must_be_set_where_the_run_is_local(check, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("EOPD_TEST_KEY", " ")
    code, shown = check(SERVED)
    assert code == 2
    assert shown == (
        "error: teachers.far.server.api_key_env: the environment variable EOPD_TEST_KEY is "
        "not set\n"
    )
    assert check(SERVED, "cluster.address=auto")[0] == 0
    monkeypatch.setenv("EOPD_TEST_KEY", "a")
    assert check(SERVED)[0] == 0


def options_of_vllm(options):
    require_vllm_options("rollout.vllm", options)


def options_of_deepspeed(options):
    require_deepspeed_options("learner.deepspeed", options)


@pytest.mark.parametrize(
    ("require", "options", "message"),
    [
        (
            options_of_vllm,
            {"max_num_seq": 4},
            ".max_num_seq: unknown key; did you mean max_num_seqs?",
        ),
        (options_of_vllm, {"zeal": 4}, ".zeal: unknown key; no known key is like it"),
        (
            options_of_vllm,
            {"tensor_parallel_size": "two"},
            ".tensor_parallel_size: must be a whole number of 1 or more (is two)",
        ),
        (
            options_of_vllm,
            {"gpu_memory_utilization": 5},
            ".gpu_memory_utilization: must be a number above 0, at most 1 (is 5)",
        ),
        (
            options_of_vllm,
            {"block_size": -1},
            ".block_size: must be a whole number above 0, or null (is -1)",
        ),
        (options_of_vllm, {"enforce_eager": 1}, ".enforce_eager: must be true or false (is 1)"),
        (
            options_of_vllm,
            {"max_num_seqs": True},
            ".max_num_seqs: must be a whole number of 1 or more, or null (is true)",
        ),
        (options_of_vllm, {"tokenizer_mode": []}, ".tokenizer_mode: must be "),
        (
            options_of_vllm,
            {"mamba_cache_mode": "alike"},
            ".mamba_cache_mode: must be align or none (is alike); did you ",
        ),
        (
            options_of_vllm,
            {"served_model_name": 3},
            ".served_model_name: must be text, a list, each text, or null (is 3)",
        ),
        (
            options_of_deepspeed,
            {"zero_optimisation": {"overlap_comm": True}},
            ".zero_optimisation: unknown key; did you mean zero_optimization?",
        ),
        (
            options_of_deepspeed,
            {"overlap_comm": True},
            ".overlap_comm: unknown key; did you mean zero_optimization.overlap_",
        ),
        (
            options_of_deepspeed,
            {"zero_optimization": {"overlap_com": True}},
            ".zero_optimization.overlap_com: unknown key; did you mean overlap_comm?",
        ),
        (
            options_of_deepspeed,
            {"zero_optimization": {"reduce_bucket_size": "lots"}},
            ".zero_optimization.reduce_bucket_size: must be a whole number above 0 (is lots)",
        ),
        (
            options_of_deepspeed,
            {"zero_optimization": {"offload_param": {"device": "cpu", "pin": True}}},
            ".zero_optimization.offload_param.pin: unknown key; ",
        ),
        (
            options_of_deepspeed,
            {"zero_optimization": [1]},
            ".zero_optimization: must be a mapping of its keys (stage, ",
        ),
        (
            options_of_vllm,
            {"kv_cache_memory_bytes": -5},
            ".kv_cache_memory_bytes: must be a whole number above 0, or null",
        ),
        (options_of_vllm, {"quantization": "nope"}, ".quantization: must be awq, "),
        (options_of_vllm, {"quantization": "gptg"}, ".quantization: must be awq, "),
        (
            options_of_deepspeed,
            {"flops_profiler": {"enabeld": True}},
            ".flops_profiler.enabeld: unknown key; did you mean enabled?",
        ),
        (
            options_of_deepspeed,
            {"activation_checkpointing": {"cpu_checkpointing": 1}},
            ".activation_checkpointing.cpu_checkpointing: must be true or false (is 1)",
        ),
        (
            options_of_deepspeed,
            {"aio": {"queue": 1}},
            ".aio.queue: unknown key; did you mean queue_depth?",
        ),
        (
            options_of_deepspeed,
            {"timers": {"throughput": {"enable": True}}},
            ".timers.throughput.enable: unknown key; did you mean enabled?",
        ),
        (
            options_of_deepspeed,
            {"data_types": {"grad_accum_dtype": "fp64"}},
            ".data_types.grad_accum_dtype: must be fp32, fp16, bf16, float32, float16 or "
            "bfloat16, or null",
        ),
        (
            options_of_deepspeed,
            {"wall_clock_breakdown": "yes"},
            ".wall_clock_breakdown: must be true or false (is 'yes')",
        ),
    ],
)
def test_native_options_are_those_of_their_library(require, options, message):
    with pytest.raises(ConfigError) as caught:
        require(options)

    key = "rollout.vllm" if require is options_of_vllm else "learner.deepspeed"
    assert str(caught.value).startswith(key + message)


@pytest.mark.parametrize(
    ("require", "options"),
    [
        (
            options_of_vllm,
            {
                "kv_cache_memory_bytes": 1 << 26,
                "cpu_offload_gb": 1,
                "kv_cache_dtype": "fp8",
                "quantization": "gptq",
                "compilation_config": {"level": 0},
                "limit_mm_per_prompt": {"image": 1},
                "attention_backend": "FLASH_ATTN",
                "max_num_batched_tokens": None,
            },
        ),
        (
            options_of_deepspeed,
            {
                "zero_optimization": {
                    "reduce_bucket_size": 5e8,
                    "overlap_comm": "auto",
                    "stage3_prefetch_bucket_size": 10,
                    "offload_optimizer": {"device": "cpu", "pin_memory": False},
                },
                "steps_per_print": 10,
                "comms_logger": {"enabled": True},
                "flops_profiler": {
                    "enabled": True,
                    "recompute_fwd_factor": 0.0,
                    "output_file": None,
                },
                "timers": {"throughput": {"enabled": False}},
                "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"},
                "aio": {"block_size": 1e6},
            },
        ),
    ],
)
def test_native_options_that_the_libraries_take_are_taken(require, options):
    require(options)


def test_types_are_read_from_source_as_far_as_they_are_plain(tmp_path):
    (tmp_path / "a.py").write_text(
        "Mode = Literal['a', 'b']\n"
        "Wide = Literal[Mode, 'c']\n"
        "class Device(str, Enum):\n    cpu = 'cpu'\n"
        "class Base: ...\n"
        "class Inner(Base):\n    n: int = Field(1, ge=0, alias='inner_n')\n"
        "class Other:\n    share: float = Field(default=0.5, gt=0, lt=1)\n"
        "class Options:\n"
        "    wide: Wide = 'a'\n"
        "    device: Device = 'cpu'\n"
        "    inner: 'Optional[Inner]' = None\n"
        "    share: float = Other.share\n"
        "    many: list[int] | None = None\n"
        "    code: Callable[[int], int] | int = 1\n"
        "    _hidden: int = 1\n"
    )
    declared = Declarations.read([tmp_path / "a.py"])
    assert declared.alias("Mode") == Literal["a", "b"] | None
    assert declared.alias("Unknown") is object
    narrow = declared.model("Options", instead={"many": int, "gone": int})
    assert narrow.model_fields["many"].annotation is int
    assert "gone" not in narrow.model_fields
    model = declared.model("Options", nested="Base")
    assert sorted(model.model_fields) == ["code", "device", "inner", "many", "share", "wide"]

    for right in (
        {"wide": "c"},
        {"device": "cpu"},
        {"inner": {"n": 0}},
        {"inner": {"inner_n": 0}},
        {"share": 0.1},
        {"many": [1]},
        {"code": "x"},
    ):
        model.model_validate_json(json.dumps(right))

    for wrong in (
        {"wide": "d"},
        {"device": "gpu"},
        {"inner": {"n": -1}},
        {"inner": {"m": 0}},
        {"share": 1.0},
        {"many": ["1"]},
        {"hidden": 1},
    ):
        with pytest.raises(ValidationError):
            model.model_validate_json(json.dumps(wrong))


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (
            ["rollout.engines=4000"],
            "the roles ask for 4004 cpus (learner 1 x 1, rollout 4000 x 1, teacher ",
        ),
        (
            ["rollout.cpus=1000"],
            "the roles ask for 1004 cpus (learner 1 x 1, rollout 1 x 1000, teacher chat 2 x 1, ",
        ),
        (
            ["cluster.cpus=3"],
            "the roles ask for 5 cpus (learner 1 x 1, rollout 1 x 1, teacher chat 2 x 1, teacher ",
        ),
        (["cluster.address=head:6379", "rollout.cpus=1000"], None),
        (["rollout.gpus=1", "teachers.0.gpus=1", "cluster.cpus=9"], "the roles ask for 3 gpus ("),
        (["rollout.gpus=1", "cluster.address=head:6379"], None),
    ],
)
def test_what_this_machine_lacks_is_a_note(check, overrides, note, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(environment, "gpus_here", lambda: 2)
    code, shown = check(*overrides)
    told = [
        line
        for line in shown.splitlines()
        if line.startswith("note: there is no room for it on this machine: ")
    ]
    assert code == 0 and len(told) == (note is not None)
    assert note is None or note in told[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teachers.0.eos_remap={{}}"],
            "error: teachers.chat: student /student, teacher /chat: the student ends a ",
        ),
        (
            ["teachers.0.eos_remap={{}}"],
            "write eos_remap: {0: 2}  # '<|endoftext|>' -> '<|im_end|>'\n",
        ),
        (
            ["teachers.1.eos_remap={{0: 2}}"],
            "error: teachers.far: student /student, teacher /base: eos_remap: the ",
        ),
        (["teachers.0.eos_remap={{0: 2, 1: 2}}"], "0 and 1 both become 2"),
        (["teachers.1.model={root}/no"], "error: teachers.far.model: there is no directory /no;"),
        (
            ["teachers.1.backend=vllm", "teachers.1.server=null"],
            "error: teachers.far.model: /base has no weights: ",
        ),
        (
            ["student.model={root}/mute"],
            "error: student.model: /mute: has no tokenizer (tokenizer.json, ",
        ),
        (
            ["teachers.0.model={root}/mute"],
            "error: teachers.chat.model: /mute: has no tokenizer (tokenizer.json, ",
        ),
        (
            ["student.model={root}/lost"],
            "error: student.model: /lost: the weights lack model.layers.1.",
        ),
        (
            ["rollout.vllm={{max_num_seq: 4}}"],
            "error: rollout.vllm.max_num_seq: unknown key; did you mean max_num_seqs?\n",
        ),
        (
            ["teachers.0.vllm={{zeal: 4}}"],
            "error: teachers.chat.vllm.zeal: unknown key; no known key is like it\n",
        ),
        (
            ["learner.deepspeed={{zero_optimization: {{overlap_com: true}}}}"],
            "error: learner.deepspeed.zero_optimization.overlap_com: unknown key; did you "
            "mean overlap_comm?\n",
        ),
        (
            ["telemetry.trackers=[mlflow]"],
            "error: telemetry.trackers: mlflow needs a server: set MLFLOW_TRACKING_URI",
        ),
        (
            ["teachers.0.template=''"],
            "error: teachers.chat.template: is empty; write {{ prompt }} and",
        ),
        (
            ["teachers.0.template={root}/c.yaml"],
            "error: teachers.chat.template: /c.yaml is a file; write its text here",
        ),
        (
            ["teachers.1.sources=[logic]"],
            "error: /train.jsonl: nobody teaches source 'code' (1 prompts); "
            "teachers.sources are 'logic', 'math', 'poems'; name it there, or leave one "
            "teacher without sources",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(check, overrides, message):
    code, shown = check(*overrides)
    assert code == 2
    assert message in shown
    assert shown.count("\n") == 1
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("x" * 300, "a name in a path has 255"),
        ("x/" * 3000, "a path has 4095"),
    ],
    ids=["long", "deep"],
)
@pytest.mark.parametrize(
    ("key", "ending"),
    [
        ("student.model", ""),
        ("teachers.0.model", ""),
        ("prompts.data", ".jsonl"),
    ],
)
def test_a_path_that_no_disk_takes_is_one_message(check, key, ending, name, most):
    code, shown = check(f"{key}={{root}}/{name}{ending}")
    assert code == 2
    assert f" {key}: " in shown
    assert shown.count("\n") == 1
    assert f"{most} bytes at most (has " in shown or "(File name too long)" in shown


def test_held_out_prompts_need_a_teacher_too(files):
    swapped = [f"prompts.held_out={files}/train.jsonl", f"prompts.data={files}/held_out.jsonl"]
    preflight.prepare(load_config(files / "c.yaml", swapped))
    with pytest.raises(ConfigError, match=r"train\.jsonl: nobody teaches source 'code'"):
        preflight.prepare(load_config(files / "c.yaml", [*swapped, "teachers.1.sources=[logic]"]))


# --- answers that a grader needs

REWARD = [
    "loss.reverse_kl={{kind: sampled, reward: {{function: math}}}}",
    "rollout.samples_per_prompt=2",
]


@pytest.fixture
def graded(files, check):
    def run(*answers):
        rows = [{"prompt": "a", "source": "math"} | answer for answer in answers]
        (files / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check("prompts.data={root}/graded.jsonl", *REWARD)

    return run


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [{"answer": 5}, {}, {"answer": None}],
            "/graded.jsonl:2 (and 1 more row): has no `answer`, so that nothing",
        ),
        (
            [{"answer": 5}, {"answer": " "}],
            "/graded.jsonl:2: answer: the grader math can read nothing in it: ' '; write",
        ),
        (
            [{"answer": "He sold half as many clips in May."}],
            "/graded.jsonl:1: answer: the grader math can read nothing",
        ),
        (
            [{"answer": "12 34"}],
            "/graded.jsonl:1: answer: the grader math can read nothing in it: '12 34'; write",
        ),
    ],
)
def test_a_reward_needs_answers_that_its_grader_can_read(graded, answers, message):
    code, shown = graded(*answers)
    assert code == 2
    assert f"error: prompts.data: {message}" in shown


def test_a_benchmark_is_loaded_and_its_answers_are_read(files, check):
    (files / "math.jsonl").write_text('{"prompt": "a", "answer": 5}\n{"prompt": "b"}\n')
    bench = "evaluation.benchmarks=[{{name: m, data: '{root}/%s', grader: math, prompts: 3, samples: 4}}]"
    code, shown = check(bench % "math.jsonl")
    assert code == 2
    assert "error: evaluation.benchmarks.m.data: /math.jsonl:2: has no `answer`" in shown
    code, shown = check(bench % "gone.jsonl")
    assert code == 2
    assert "error: evaluation.benchmarks.m.data: " in shown

    (files / "math.jsonl").write_text(
        '{"prompt": "a", "answer": 5}\n{"prompt": "b", "answer": 6}\n'
    )
    code, shown = check(bench % "math.jsonl", "evaluation.every=7", "run.batches=7")
    assert code == 0
    assert "benchmark m: 2 prompts x 4, every 7 batches" in shown
    assert (
        "note: evaluation.benchmarks.m.prompts: 3 is above the 2 prompts of its data; all of "
        "them are used"
    ) in shown
    assert "note: evaluation.every: 7 is not below run.batches 7; nothing is measured" in shown


def test_a_benchmark_has_columns_of_its_own(files, check):
    (files / "named.jsonl").write_text('{"question": "a", "solution": 5, "prompt": "no"}\n')
    (files / "own.jsonl").write_text('{"prompt": "a", "answer": 5}\n')
    data = "prompts={{data: {root}/named.jsonl, held_out: {root}/named.jsonl, max_tokens: 64, "
    data += "columns: {{prompt: question, answer: solution}}}}"
    bench = "evaluation.benchmarks=[{{name: m, data: {root}/own.jsonl%s}}]"
    code, shown = check(data, bench % "")
    assert code == 2
    assert "benchmarks.m.data: /own.jsonl: has no column 'question' to be prompt; " in shown
    code, shown = check(data, bench % ", columns: {{}}")
    assert code == 0
    assert "benchmark m: 1 prompts" in shown


def test_a_benchmark_of_several_parts_asks_one_of_each_in_turn(files, check):
    (files / "one.jsonl").write_text(
        '{"id": "p", "prompt": "a", "answer": 5}\n{"id": "q", "prompt": "b", "answer": 6}\n'
    )
    (files / "two.jsonl").write_text('{"id": "p", "question": "c", "solution": 7}\n')
    data = "[{{data: {root}/one.jsonl, columns: {{}}}}, {root}/two.jsonl]"
    columns = "{{prompt: question, answer: solution}}"
    bench = f"evaluation.benchmarks=[{{{{name: m, data: {data}, columns: %s}}}}]"
    config = load_config(files / "c.yaml", [(bench % columns).format(root=files)])
    prompts = preflight.prepare(config).benchmarks["m"].prompts
    assert [prompt.prompt_id for prompt in prompts] == ["0/p", "1/p", "0/q"]
    assert [prompt.reference_answer for prompt in prompts] == ["5", "7", "6"]

    code, shown = check(bench % "null")
    assert code == 2
    assert 'error: evaluation.benchmarks.m.data.1: /two.jsonl:1 (id "p"): needs either' in shown


def test_several_answers_and_whole_solutions_are_fine_for_a_reward(graded):
    assert (
        graded(
            {"answer": [5, "five"]},
            {"answer": "2 + 3 = 5\n#### 5"},
            {"answer": r"So \boxed{5}."},
        )[0]
        == 0
    )


# --- functions of the user

FUNCTIONS = """
import torch

def gate(tokens, *, low=0.0):
    return (tokens.teacher_entropy / 9).clamp(low, 1)

def never_enough(tokens):
    return tokens.teacher_entropy

def drawn(tokens):
    return torch.rand(len(tokens.teacher_entropy))

def score(row, response, response_ids, *, column="weight"):
    return row[column] / len(response_ids)

def keep(scored):
    return scored.teacher_logprobs.mean() > -9

def grade(response, reference):
    return response == reference

def perhaps(response, reference):
    return 0.5
"""


@pytest.fixture
def functions(tmp_path, monkeypatch, files):
    rows = [{"prompt": "a", "source": "math", "weight": 3}, {"prompt": "b", "source": "math"}]
    (files / "weighed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "made_up.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield [
        "prompts.data={root}/weighed.jsonl",
        "rollout.samples_per_prompt=2",
        "loss.gate={{kind: custom, function: 'made_up:gate'}}",
        "loss.reverse_kl.reward={{function: 'made_up:score'}}",
        "flow.filter={{function: 'made_up:keep'}}",
    ]

    sys.modules.pop("made_up", None)


def test_functions_of_the_user_are_tried_and_reported_with_their_sources(functions, check):
    code, shown = check(*functions)
    assert code == 0
    for key, name in (
        ("flow.filter", "keep"),
        ("loss.gate", "gate"),
        ("loss.reverse_kl.reward", "score"),
    ):
        assert re.search(
            rf"^function {re.escape(key)}\.function: made_up:{name}, sha256 [0-9a-f]{{64}}$",
            shown,
            re.M,
        )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "loss.gate.function=made_up:drawn",
            "made_up:drawn: is not pure (a gate keeps nothing between calls, and draws no numbers)",
        ),
        (
            "loss.gate.function=made_up:never_enough",
            "loss.gate.function: made_up:never_enough: returned 0 to 3; a gate is from 0 to 1",
        ),
        (
            "loss.gate.options={{high: 1}}",
            "loss.gate.function: made_up:gate: its parameters are (tokens, *, low=0.0), it is called "
            "with tokens and the options high: got an unexpected keyword argument 'high'",
        ),
        (
            "loss.reverse_kl.reward.options={{column: keywords}}",
            "loss.reverse_kl.reward.function: made_up:score: raised KeyError: 'keywords' (",
        ),
        (
            "loss.reverse_kl.reward.function=lost_module:score",
            "loss.reverse_kl.reward.function: lost_module:score: there is no module lost_module",
        ),
        (
            "flow.filter.function=made_up:grade",
            "flow.filter.function: made_up:grade: its parameters are (response, reference), it is",
        ),
        (
            "flow.filter.options={{nats: 1}}",
            "flow.filter.function: made_up:keep: its parameters are (scored), it is called with",
        ),
    ],
)
def test_a_function_that_cannot_be_used_is_one_message(functions, check, override, words):
    code, shown = check(*functions, override)
    assert code == 2
    assert shown.count("\n") == 1 and words in shown


def test_a_grader_of_the_user_is_tried_with_the_first_answer(functions, files):
    prompts = (fakes.prompt(answer="5"),)
    data = PromptSet(prompts=prompts, parts=(prompts,), texts={}, places={}, notes=())
    preflight.require_answers(data, "made_up:grade", "--grader")
    words = "--grader: made_up:perhaps: must return True, False or None (is 0.5)"
    with pytest.raises(ConfigError, match=re.escape(words)):
        preflight.require_answers(data, "made_up:perhaps", "--grader")
