"""YAML and overrides to a checked config: a mistake is one message that names key, value and
what is allowed.
"""

import os
import re
from pathlib import Path

import fakes
import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from eopd.config import Config, ConfigError, dump_config, load_config
from eopd.config.base import FunctionName, GraderName, Section, functions_of
from eopd.preflight.report import oddities

MINIMAL = """
run: {name: r, batches: 2}
student: {model: models/s}
teachers: [{model: models/t}]
prompts: {data: a.jsonl, held_out: b.jsonl, max_tokens: 100}
rollout: {max_response_tokens: 100}
evaluation: {max_response_tokens: 50}
flow: {batch_prompts: 8}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    return file


def test_the_resolved_config_loads_back_equal(path, tmp_path):
    config = load_config(
        path, ["loss.gate={kind: always}", "teachers.0.temperature=0.7", "rollout.vllm.seed=3"]
    )
    assert config.loss.gate.kind == "always"
    assert config.teachers[0].temperature == 0.7
    assert config.rollout.vllm == {"seed": 3}
    assert Path(config.student.model).is_absolute() and config.run.path.is_absolute()
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_without_lora_there_are_no_adapters_and_a_single_target_is_a_list_of_one(path, tmp_path):
    assert load_config(path).student.lora is None
    whole = load_config(path, ["student.lora={}"])
    assert whole.student.lora.target_modules == ("all-linear",)
    one = load_config(path, ["student.lora.target_modules=q_proj"])
    assert one.student.lora.target_modules == ("q_proj",)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(one))
    assert load_config(again) == one


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], None),
        (["loss.gate={kind: random}", "flow.max_staleness=2", "learner.ranks=2"], None),
        (["loss.gate=quantile"], "loss.gate: quantile"),
        (
            ["learner.optimizer_steps_per_batch=2"],
            "learner.optimizer_steps_per_batch above 1",
        ),
        (
            ["loss.reverse_kl.reward={function: exact}", "rollout.samples_per_prompt=2"],
            "loss.reverse_kl.reward",
        ),
    ],
)
def test_a_step_is_begun_early_unless_it_needs_its_whole_batch(path, overrides, why):
    assert load_config(path, overrides).waits_for_batch == why


def test_alpha_grows_linearly_over_its_warm_up(path):
    loss = load_config(path, ["loss.alpha=2.0", "loss.alpha_warmup={start: 0.5, batches: 4}"]).loss
    assert [loss.alpha_at(b) for b in (0, 2, 4, 9)] == [1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=2", "rollout.engine: unknown key; did you mean engines?"),
        ("loss.gate={kind: hard, taw: 1}", "loss.gate.taw: unknown key; did you mean tau?"),
        ("teachers.0.modle=x", "teachers.0.modle: unknown key; did you mean model?"),
        ("lerner={}", "lerner: unknown key; did you mean learner?"),
        ("learner.lr=-1", "learner.lr: must be a number above 0, at most 1 (is -1)"),
        (
            "loss.gate={kind: soft}",
            "loss.gate.kind: soft is unknown; kinds are hard, quantile, sigmoid, random, "
            "always, never and custom",
        ),
        (
            "learner.token_budget=150",
            "learner.token_budget: 150 is below prompts.max_tokens + rollout.max_response_tokens = 200; "
            "the longest trajectory would fit no micro-batch",
        ),
        (
            "evaluation.benchmarks=[{name: m, data: m.jsonl}, {name: m, data: n.jsonl}]",
            "evaluation.benchmarks: the name 'm' stands twice",
        ),
        (
            "evaluation.benchmarks=[{name: held_out, data: m.jsonl}]",
            "evaluation.benchmarks: the name 'held_out' is taken",
        ),
        (
            "evaluation.benchmarks=[{name: m, data: m.jsonl, grader: maths}]",
            "evaluation.benchmarks.0.grader: must be package.module:name, such as "
            "my_rewards:score (is 'maths'), or one of exact, math; did you mean math?",
        ),
        (
            "evaluation.benchmarks=[{name: m, data: m.jsonl, top_p: 0}]",
            "evaluation.benchmarks.0.top_p: must be a number above 0, at most 1 (is 0)",
        ),
        (
            "evaluation.benchmarks=[{name: m, data: m.jsonl, stop: [a, '']}]",
            "evaluation.benchmarks.0.stop: a text that ends a response has at least one character",
        ),
        (
            "evaluation.every=0",
            "evaluation.every: must be a whole number from 1 to 1000000000, or null (is 0)",
        ),
        (
            "checkpoint.keep_best={metric: maths/avg_at_n, mode: max}",
            "checkpoint.keep_best.metric: nothing is measured as maths; there is held_out "
            "(evaluation.benchmarks)",
        ),
        (
            "checkpoint.keep_best={metric: held_out/avg_at_n, mode: max}",
            "checkpoint.keep_best.metric: held_out has no avg_at_n; it has reverse_kl, "
            "forward_kl, top1_agreement",
        ),
        (
            "checkpoint.keep_best={metric: held_out/reverse_kl, mode: min}",
            "checkpoint.keep_best.metric: held_out is not measured while training; set "
            "evaluation.every to at most run.batches 2 (is null)",
        ),
        (
            "checkpoint.keep_best={metric: reverse_kl, mode: min}",
            "checkpoint.keep_best.metric: must be NAME/METRIC, such as held_out/reverse_kl "
            "(is reverse_kl)",
        ),
        (
            "flow.lookahead=1",
            "flow.lookahead: 1 is above flow.max_staleness 0; a batch that overtakes makes "
            "the others that much staler",
        ),
        (
            "learner.ranks=9",
            "flow.batch_prompts: a batch of 8 trajectories cannot be cut into 1 optimiser "
            "steps on 9 ranks",
        ),
        (
            "learner.deepspeed={train_batch_size: 4}",
            "learner.deepspeed.train_batch_size: cannot be set here: learner.token_budget and "
            ".optimizer_steps_per_batch cut the batches",
        ),
        (
            "learner.deepspeed={communication_data_type: fp16}",
            "learner.deepspeed.communication_data_type: may not be fp16: sums over the tokens of a "
            "batch leave the range of float16",
        ),
        (
            "learner.deepspeed={bfloat16: {enabled: true}}",
            "learner.deepspeed.bfloat16: cannot be set here: student.dtype says it",
        ),
        (
            "rollout.vllm={logprobs_mode: raw_logprobs}",
            "rollout.vllm.logprobs_mode: cannot be set here: the learner needs the probabilities "
            "that were sampled from",
        ),
        ("teachers=[]", "teachers: there must be at least one; write - {model: ...} below it"),
        ("teachers=[{model: a}, {model: b}]", "teachers: the name teacher stands twice"),
        (
            "teachers=[{model: a, name: a}, {model: b, name: b}]",
            "teachers: a and b name no sources; only one can be the default",
        ),
        (
            "teachers=[{model: a, name: a, sources: [x, y]}, {model: b, name: b, sources: x}]",
            "teachers: the source x stands twice",
        ),
        ("teachers.0.backend=eopd", "teachers.0.backend: eopd needs a server section"),
        ("teachers.0.server={url: 'http://h'}", "teachers.0.backend: vllm takes no server section"),
        (
            "teachers.0={model: a, backend: eopd, server: {url: 'h:80'}}",
            "teachers.0.server.url: must be the root of a server, as http://host:8000, "
            "without user, key, ? or # (is h:80)",
        ),
        (
            "teachers.0={model: a, backend: eopd, server: {url: 'http://me:key@h'}}",
            "teachers.0.server.url: must be the root of a server, as http://host:8000, "
            "without user, key, ? or #",
        ),
        (
            "teachers.0={model: a, backend: eopd, server: {url: 'http://h'}, vllm: {seed: 1}}",
            "teachers.0.vllm: must be empty with backend eopd, whose server has its own options",
        ),
        (
            "teachers.0={model: a, backend: openai, server: {url: 'http://h'}}",
            "teachers.0.server.model: is required with backend openai: the name the model "
            "is served under",
        ),
        (
            "teachers.0={model: a, backend: openai, temperature: 0.7, server: {url: "
            "'http://h', model: m}}",
            "teachers.0.temperature: must be 1 with backend openai (is 0.7); the prompt "
            "log-probabilities of a stock server are always those at 1",
        ),
        (
            "teachers.0.max_prompt_tokens=5",
            "teachers.0.max_prompt_tokens: is of a teacher with a template",
        ),
        (
            "teachers.0.vllm={runner: generate}",
            "teachers.0.vllm.runner: cannot be set here: a teacher reads and does not write",
        ),
        (
            "learner.betas=[0.9, 2]",
            "learner.betas.1: must be a number of 0 or more, below 1 (is 2)",
        ),
        (
            "weights.backend=nccl",
            "weights.backend: nccl moves weights between GPUs that are not shared; it needs "
            "learner.gpus 1 (is 0) and rollout.gpus of 1 or more (is 0); else write auto",
        ),
        (
            "learner.deepspeed={zero_optimization: {stage: 3}}",
            "learner.deepspeed.zero_optimization.stage: cannot be set here: "
            "learner.zero_stage says it",
        ),
        (
            "loss.reverse_kl={kind: sampled, reward: {function: math}}",
            "loss.reverse_kl.reward: compares a prompt's samples within one batch; it needs "
            "rollout.samples_per_prompt of 2 or more (is 1)",
        ),
        (
            "loss.reverse_kl={kind: none, reward: {function: math}}",
            "loss.reverse_kl.reward: is of kind sampled, and kind is none; leave it out, or "
            "change kind",
        ),
        (
            "student.dtype=float16",
            "student.dtype: must be auto, float32 or bfloat16 (is float16); did you mean bfloat16?",
        ),
        ("student.lora.rank=0", "student.lora.rank: must be a whole number from 1 to 4096 (is 0)"),
        (
            "student.lora={alpha: 0}",
            "student.lora.alpha: must be a number above 0, at most 1e+06 (is 0)",
        ),
        ("student.lora={ranks: 4}", "student.lora.ranks: unknown key; did you mean rank?"),
        (
            "student.lora.target_modules=[]",
            "student.lora.target_modules: must be a list of at least one, each text (is [])",
        ),
        ("loss.alpha=.inf", "loss.alpha: must be a number from 0 to 1e+06 (is .inf)"),
        (
            "run.name=a/b",
            "run.name: must be letters, digits, '.', '_' and '-', of which the first is a "
            "letter or digit (is a/b)",
        ),
        ("flow.batch_prompts", "--set flow.batch_prompts: must be section.key=value"),
        ("teachers.1.model=x", "--set teachers.1.model=x: teachers.1 must be an index below 1"),
        ("run.name.x=1", "--set run.name.x=1: run.name is a value, it has no key x"),
        (
            "run.seed=[",
            "--set run.seed=[: is not YAML: a [ or { is never closed; put YAML's quotes around a "
            "text: --set 'run.seed=\"...\"'",
        ),
        ("learner.lr=true", "learner.lr: must be a number above 0, at most 1 (is true)"),
        ("run.batches=true", "run.batches: must be a whole number from 1 to 1000000000 (is true)"),
        (
            "run.batches=1:30",
            "run.batches: 1:30 is a number of base 60 in YAML 1.1: write it in digits alone",
        ),
        (
            "run.batches=010",
            "run.batches: 010 is octal in YAML 1.1, for its leading zero: write it without",
        ),
        ("run.batches=2.5", "run.batches: must be a whole number from 1 to 1000000000 (is 2.5)"),
        (
            "run.batches=1e30",
            "run.batches: must be a whole number from 1 to 1000000000 (is 1.0e+30)",
        ),
        ("run.batches=null", "run.batches: must be a whole number from 1 to 1000000000 (is null)"),
        ("run.batches=", "run.batches: must be a whole number from 1 to 1000000000 (is null)"),
        ("learner.lr=9", "learner.lr: must be a number above 0, at most 1 (is 9)"),
        ("learner.lr=abc", "learner.lr: must be a number above 0, at most 1 (is abc)"),
        ("learner.lr=.nan", "learner.lr: must be a number above 0, at most 1 (is .nan)"),
        (
            "run.name=my run",
            "run.name: must be letters, digits, '.', '_' and '-', of which the first is a "
            "letter or digit (is my run)",
        ),
        (
            "run.name=null",
            "run.name: must be letters, digits, '.', '_' and '-', of which the first is a "
            "letter or digit (is null)",
        ),
        (
            "run.seed=18446744073709551616",
            "run.seed: must be a whole number from 0 to 18446744073709551615 (is "
            "18446744073709551616)",
        ),
        (
            "evaluation.seed=123456789012345678901234567890",
            "evaluation.seed: must be a whole number from 0 to 18446744073709551615 (is "
            "123456789012345678901234567890)",
        ),
        (
            "learner=[1]",
            "learner: must be a mapping of its keys (ranks, cpus, gpus, threads, ...) (is [1])",
        ),
        (
            "rollout.node_labels={a/b/c: d}",
            "rollout.node_labels: a/b/c: d is no label: a name and a value have up to 63 "
            "letters, digits, -, _ and ., with a letter or digit at both ends, and a name may have one / "
            "within",
        ),
        (
            "learner.node_labels={pool: in(a)}",
            "learner.node_labels: pool: in(a) is no label: a name and a value have up to 63 "
            "letters, digits, -, _ and ., with a letter or digit at both ends, and a name may have one / "
            "within",
        ),
        (
            "learner=5",
            "learner: must be a mapping of its keys (ranks, cpus, gpus, threads, ...) (is 5)",
        ),
        (
            "loss.gate=hrad",
            "loss.gate.kind: hrad is unknown; did you mean hard? kinds are hard, quantile, "
            "sigmoid, random, always, never and custom",
        ),
        ("loss.gate.top=0.3", "loss.gate.kind: is required; top is of kind quantile"),
        (
            "loss.gate={tau: 0.8, scale: 0.1}",
            "loss.gate.kind: is required; tau and scale are of kind sigmoid",
        ),
        (
            "loss.gate={tau: 0.8, top: 0.1}",
            "loss.gate.kind: is required; kinds are hard, quantile, sigmoid, random, always, "
            "never and custom",
        ),
        (
            "loss.gate={tau: 0.8, kind: quantile}",
            "loss.gate.tau: is of kinds hard and sigmoid, and kind is quantile; leave it "
            "out, or change kind",
        ),
        (
            "loss.gate={kind: always, rate: 0.8}",
            "loss.gate.rate: is of kind random, and kind is always; leave it out, or change kind",
        ),
        (
            "loss.gate={kind: hrad}",
            "loss.gate.kind: hrad is unknown; did you mean hard? kinds are hard, quantile, "
            "sigmoid, random, always, never and custom",
        ),
        (
            "loss.gate=null",
            "loss.gate: must be {kind: hard}, {kind: quantile}, {kind: sigmoid}, {kind: random}, "
            "{kind: always}, {kind: never} or {kind: custom} (is null)",
        ),
        (
            "loss.gate=[hard]",
            "loss.gate: must be {kind: hard}, {kind: quantile}, {kind: sigmoid}, {kind: random}, "
            "{kind: always}, {kind: never} or {kind: custom} (is [hard])",
        ),
        (
            "loss.gate=5",
            "loss.gate.kind: 5 is unknown; kinds are hard, quantile, sigmoid, "
            "random, always, never and custom",
        ),
        (
            "loss.forward_kl=renormalised",
            "loss.forward_kl.kind: renormalised is unknown; did you mean renormalized? kinds are "
            "renormalized, tail and truncated",
        ),
        (
            "loss={reverse_kl: none, alpha: 0}",
            "loss.reverse_kl: none leaves no loss at all where loss.alpha is 0 or loss.gate "
            "never opens",
        ),
        (
            "loss={reverse_kl: none, gate: never}",
            "loss.reverse_kl: none leaves no loss at all where loss.alpha is 0 or loss.gate "
            "never opens",
        ),
        (
            "loss={reverse_kl: none, gate: {kind: random, rate: 0}}",
            "loss.reverse_kl: none leaves no loss at all where loss.alpha is 0 or loss.gate "
            "never opens",
        ),
        (
            "student.lora={rank: 100000}",
            "student.lora.rank: must be a whole number from 1 to 4096 (is 100000)",
        ),
        (
            "student.lora=8",
            "student.lora: must be a mapping of its keys (rank, alpha, "
            "target_modules), or null (is 8)",
        ),
        (
            "telemetry.trackers=wandbb",
            "telemetry.trackers.0: must be tensorboard, wandb or mlflow (is wandbb); did "
            "you mean wandb?",
        ),
        ("telemetry.trackers=[wandb, wandb]", "telemetry.trackers: tracker wandb stands twice"),
        (
            "telemetry.port=none",
            "telemetry.port: must be a whole number from 0 to 65535, or null (is none)",
        ),
        (
            "telemetry.port=99999",
            "telemetry.port: must be a whole number from 0 to 65535, or null (is 99999)",
        ),
        (
            "telemetry={port: null, discovery: targets}",
            "telemetry.discovery: there is no endpoint to tell of, since telemetry.port is "
            "null; 0 takes a free one",
        ),
        ("teachers=null", "teachers: there must be at least one; write - {model: ...} below it"),
        (
            "teachers=x",
            "teachers.0: must be a mapping of its keys (name, backend, model, server, ...) (is x)",
        ),
        ("teachers=[null]", "teachers.0.model: is required"),
        (
            "teachers.model=x",
            "--set teachers.model=x: teachers is a list; write teachers.0.model for its first item",
        ),
        ("teachers.3.model=x", "--set teachers.3.model=x: teachers.3 must be an index below 1"),
        (
            "learner.betas=0.9",
            "learner.betas: must be a list of 2, each a number of 0 or more, below 1 (is [0.9])",
        ),
        (
            "learner.betas=[0.9]",
            "learner.betas: must be a list of 2, each a number of 0 or more, below 1 (is [0.9])",
        ),
        ("learner.zero_stage=4", "learner.zero_stage: must be auto, 0, 1, 2 or 3 (is 4)"),
        ("learner.zero_stage=true", "learner.zero_stage: must be auto, 0, 1, 2 or 3 (is true)"),
        (
            "learner.zero_stage=01",
            "learner.zero_stage: 01 is octal in YAML 1.1, for its leading zero: write it without",
        ),
        (
            "learner.zero_stage=avto",
            "learner.zero_stage: must be auto, 0, 1, 2 or 3 (is avto); did you mean auto?",
        ),
        (
            "student.dtype=bf16",
            "student.dtype: must be auto, float32 or bfloat16 (is bf16); did you mean bfloat16?",
        ),
        (
            "student.model=",
            "student.model: must be a directory, or OWNER/NAME on the Hugging Face Hub (is null)",
        ),
        ("student.model=''", "student.model: must be a path (is ''); . is the working directory"),
        (
            "student.model=~nosuchuser/x",
            "student.model: ~nosuchuser/x: there is no such user, or no home directory",
        ),
        (
            "student.model=$HOME/x",
            "student.model: $HOME/x: variables are not filled in; write the path out, or "
            "begin it with ~",
        ),
        (
            "student.model=s3://bucket/x",
            "student.model: s3://bucket/x is an address; it must be a path on a disk that "
            "every node reads",
        ),
        *(
            (
                f"prompts.data={address}",
                f"prompts.data: {address} is an address; it must be a path on a disk that every "
                "node reads",
            )
            for address in ("https://a.org/rows.jsonl", "hf://datasets/a/b")
        ),
        (
            "student.model=/" + "ä" * 128,
            "student.model: a name in a path has 255 bytes at most (has 256)",
        ),
        (
            "prompts.data=/" + "a" * 250 + ".jsonl",
            "prompts.data: a name in a path has 255 bytes at most (has 256)",
        ),
        (
            "run.directory=/" + "a/" * 2048,
            "run.directory: a path has 4095 bytes at most (has 4096)",
        ),
        ('student.model="a\\0b"', "student.model: a path holds no NUL character"),
        ('student.model="a/b@\\0"', "student.model: a path holds no NUL character"),
        (
            "prompts.data=''",
            "prompts.data: must be a .jsonl or .parquet file, or a data set's name (is '')",
        ),
        ('prompts.data="a\\0b.jsonl"', "prompts.data: a path holds no NUL character"),
        (
            'prompts.data=["a\\0b.jsonl", c]',
            "prompts.data.0.data: a path holds no NUL character",
        ),
        (
            "prompts.data=[a.jsonl, '']",
            "prompts.data.1.data: must be a .jsonl or .parquet file, or a data set's name (is '')",
        ),
        (
            "evaluation.benchmarks=[{name: m, data: ' '}]",
            "evaluation.benchmarks.0.data: must be a .jsonl or .parquet file, or a data set's "
            "name (is '')",
        ),
        (
            "prompts.held_out=[]",
            "prompts.held_out: must be text, a mapping of the keys of a part, or a list of these, "
            "at least one (is [])",
        ),
        (
            "prompts.data=[[a]]",
            "prompts.data.0: must be text, or a mapping of its keys (data, function, options, "
            "source, ...) (is [a])",
        ),
        (
            "prompts.data={weight: 2}",
            "prompts.data.0: must have one of data and function: a part comes from one place",
        ),
        (
            "prompts.data={data: a, function: 'm:f'}",
            "prompts.data.0: must have one of data and function: a part comes from one place",
        ),
        (
            "prompts.data={data: a, options: {n: 1}}",
            "prompts.data.0.options: are keyword arguments of function, which is not there",
        ),
        (
            "prompts.data={function: rows}",
            "prompts.data.0.function: must be package.module:name, such as my_rewards:score (is "
            "'rows')",
        ),
        (
            "prompts.data={data: a, source: x, columns: {source: y}}",
            "prompts.data.0.source: is said by columns.source too; keep one of them",
        ),
        (
            "prompts.data={data: a, weigth: 2}",
            "prompts.data.0.weigth: unknown key; did you mean weight?",
        ),
        (
            "prompts.data=[{data: a, weight: 1}, b]",
            "prompts.data.1.weight: is missing; give every part a weight, or none",
        ),
        (
            "prompts.data=[{data: a, weight: 0}]",
            "prompts.data.0.weight: must be a number above 0, at most 1e+06, or null (is 0)",
        ),
        (
            "prompts.held_out={data: b, weight: 1}",
            "prompts.held_out.0.weight: unknown key; did you mean prompts.data[].weight or "
            "loss.reverse_kl.reward.weight?",
        ),
        (
            "prompts.columns={promt: q}",
            "prompts.columns: no column plays the role 'promt'; did you mean prompt? roles are "
            "prompt, messages, tools, id, answer, source",
        ),
        (
            "prompts.columns={prompt: ''}",
            "prompts.columns: prompt: must be the name of a column (is '')",
        ),
        (
            "prompts.columns=question",
            "prompts.columns: must be a mapping from prompt, messages, tools, id, answer or source "
            "to the name of a column (is question)",
        ),
        ("prompts.columns={prompt: [q]}", "prompts.columns.prompt: must be text (is [q])"),
        ("prompts.system=''", "prompts.system: must be text, or null (is '')"),
        (
            "prompts={data: a, held_out: b, system: s, template: none}",
            "prompts.system: is a message of a chat; template is none",
        ),
        (
            "prompts.suffix=#1 answer",
            "--set prompts.suffix=#1 answer: ends at #, where a comment of YAML "
            "begins; put YAML's quotes around a text: --set 'prompts.suffix=\"...\"'",
        ),
        (
            "prompts.suffix=: x",
            "--set prompts.suffix=: x: is not YAML: while parsing a block "
            "mapping, expected <block end>, but found ':'; put YAML's quotes around a text: "
            "--set 'prompts.suffix=\"...\"'",
        ),
        (".run=x", "--set .run=x: must be section.key=value; a part of the key is empty"),
        ("run..name=x", "--set run..name=x: must be section.key=value; a part of the key is empty"),
        ("run.lr=1e-4", "run.lr: unknown key; did you mean learner.lr?"),
        ("run.seeed=1", "run.seeed: unknown key; did you mean seed?"),
        (
            "foo=1",
            "foo: unknown key; allowed here: checkpoint, cluster, evaluation, flow, guard, learner, "
            "loss, prompts, rollout, run, student, teachers, telemetry, weights",
        ),
        ("learner.threads=1000", "learner.threads: must be a whole number from 1 to 512 (is 1000)"),
        (
            "learner.token_budget=1000000000000",
            "learner.token_budget: must be a whole number from 1 to 100000000 (is 1000000000000)",
        ),
        (
            "rollout.engines=1000000",
            "rollout.engines: must be a whole number from 1 to 4096 (is 1000000)",
        ),
        (
            "rollout.temperature=1e-30",
            "rollout.temperature: must be a number from 0.01 to 2 (is 1.0e-30)",
        ),
        (
            "rollout.temperature=2.5",
            "rollout.temperature: must be a number from 0.01 to 2 (is 2.5)",
        ),
        (
            "evaluation.benchmarks=[{name: m, data: m.jsonl, temperature: 3}]",
            "evaluation.benchmarks.0.temperature: must be a number from 0.01 to 2 (is 3)",
        ),
        ("rollout.temperature=0", "rollout.temperature: must be a number from 0.01 to 2 (is 0)"),
        (
            "learner.gpus=2",
            "learner.gpus: one rank uses one GPU (is 2); raise learner.ranks for more",
        ),
        (
            "learner={gpus: 0.5, ranks: 2}",
            "learner.gpus: 2 ranks may not share a GPU, since NCCL joins them (is 0.5); "
            "write 1, or ranks: 1",
        ),
        (
            "rollout.gpus=1.5",
            "rollout.gpus: 1.5 is neither a whole number of GPUs nor, below 1, a share of one",
        ),
        (
            "rollout.gpus=0.5",
            "rollout.gpus: 0.5 is a share, and the engine would take 92 % of the GPU's memory; "
            "add vllm: {gpu_memory_utilization: 0.45}, or kv_cache_memory_bytes",
        ),
        (
            "rollout={max_response_tokens: 100, gpus: 1, vllm: {tensor_parallel_size: 4}}",
            "rollout.gpus: must be 4 for vllm.tensor_parallel_size 4 (is 1)",
        ),
        (
            "rollout={max_response_tokens: 100, gpus: 2}",
            "rollout.gpus: the engine would use one of 2; add vllm: {tensor_parallel_size: 2}",
        ),
        (
            "rollout.vllm={data_parallel_size: 2}",
            "rollout.vllm.data_parallel_size: cannot be set here: an engine lives in one process "
            "group on one node; raise the number of engines instead",
        ),
        (
            "rollout.vllm={enable_lora: true, model: x}",
            "rollout.vllm.enable_lora: cannot be set here: student.lora trains "
            "adapters, which engines merge into their weights; vllm.model: cannot be set here: "
            "student.model says it",
        ),
        (
            "rollout.vllm={enforce_eager: yes}",
            "rollout.vllm.enforce_eager: yes is true in YAML 1.1 and text in YAML 1.2: "
            "write true, or 'yes' in quotes",
        ),
        (
            "rollout.vllm={seed: 010}",
            "rollout.vllm.seed: 010 is octal in YAML 1.1, for its leading zero: write it "
            "without, or quote it if it is text",
        ),
        ("rollout.vllm={x: .nan}", "rollout.vllm.x: must be a finite number (is .nan)"),
        ("rollout.vllm=[a]", "rollout.vllm: must be a mapping of options (is [a])"),
        (
            "teachers.0={model: x, backend: openai, server: {url: 'http://h/v1', model: m}}",
            "teachers.0.server.url: must be the root of the server: leave /v1 off",
        ),
        (
            "teachers.0={model: x, backend: openai, server: {url: "
            "'http://h:8000/at/v1/chat/completions/', model: m}}",
            "teachers.0.server.url: must be the root of the server: leave /v1/chat/completions off",
        ),
        (
            "teachers.0.vllm={tokenizer: /nope}",
            "teachers.0.vllm.tokenizer: cannot be set here: the one of the model is used, "
            "since prompts go to an engine as its token ids",
        ),
        (
            "teachers.0={model: x, backend: openai, server: {url: 'http://h:99999', model: m}}",
            "teachers.0.server.url: names no host and port; write it as http://host:8000",
        ),
        (
            "teachers.0={model: x, backend: openai, server: {url: 'http://h', model: m, "
            "api_key_env: sk-123}}",
            "teachers.0.server.api_key_env: must be the name of an environment variable, which "
            "holds the key, and not the key itself",
        ),
        (
            "teachers.0={model: x, backend: openai, server: {url: 'http://me:key@h', model: m}}",
            "teachers.0.server.url: must be the root of a server, as http://host:8000, "
            "without user, key, ? or #",
        ),
        ("teachers.0.eos_remap={a: b}", "teachers.0.eos_remap.a: keys must be whole numbers here"),
        (
            "prompts.template_options={5: x}",
            "prompts.template_options.5: keys must be text here: write '5' in quotes",
        ),
        ("rollout.vllm={5: x}", "rollout.vllm.5: keys must be text here: write '5' in quotes"),
        ("run.name=" + "a" * 201, "run.name: must have 200 characters at most (has 201)"),
        (
            "teachers.0.name=" + "a" * 999,
            "teachers.0.name: must have 200 characters at most (has 999)",
        ),
        (
            "teachers.0.eos_remap={1: 2, 0x1: 3}",
            "teachers.0.eos_remap.0x1: stands twice, written in two ways",
        ),
        (
            "teachers.0.eos_remap={0: 2, 1: 2}",
            "teachers.0.eos_remap: 0 and 1 both become 2, which has one way back only",
        ),
        ("teachers.0.eos_remap={-1: 2}", "teachers.0.eos_remap: -1 is no token id"),
        (
            "teachers.0.eos_remap=5",
            "teachers.0.eos_remap: must be a mapping of whole numbers (is 5)",
        ),
        (
            "learner.activation_checkpointing=maybe",
            "learner.activation_checkpointing: must be true or false (is maybe)",
        ),
        (
            "learner.deepspeed={zero_optimization: {offload_param: true}}",
            "learner.deepspeed.zero_optimization.offload_param: must be {device: cpu} or "
            "{device: none} (is true)",
        ),
        ("telemetry.host=''", "telemetry.host: must be the name or number of a host (is '')"),
        (
            "teachers[0].model=x",
            "--set teachers[0].model=x: an item of a list is named by its number: "
            "teachers.0.model=...",
        ),
        ("teachers.-1.model=x", "--set teachers.-1.model=x: teachers.-1 must be an index below 1"),
        (
            "rollout.vllm={runner: pooling}",
            "rollout.vllm.runner: cannot be set here: a rollout engine writes",
        ),
        (
            "cluster.address=none",
            "cluster.address: none is text in YAML: write null, or 'none' in quotes",
        ),
        (
            "rollout.vllm={a: None}",
            "rollout.vllm.a: None is text in YAML: write null, or 'None' in quotes",
        ),
        (
            "student.lora=none",
            "student.lora: must be a mapping of its keys (rank, alpha, target_modules), or "
            "null (is none)",
        ),
        (
            "learner.lr=1" + "0" * 399,
            "learner.lr: must be a number above 0, at most 1 (is 1" + "0" * 79 + " ...)",
        ),
        (
            "run.batches=1" + "0" * 399,
            "run.batches: must be a whole number from 1 to 1000000000 (is 1" + "0" * 79 + " ...)",
        ),
        (
            "run.batches=1" + "0" * 5000,
            "run.batches: must be a whole number from 1 to 1000000000 (is 1" + "0" * 79 + " ...)",
        ),
        (
            "cluster.cpus=-1",
            "cluster.cpus: must be a whole number from 1 to 100000, or null (is -1)",
        ),
        (
            "cluster.cpus=0.5",  # Ray has whole ones alone
            "cluster.cpus: must be a whole number from 1 to 100000, or null (is 0.5)",
        ),
        (
            "learner.peak_flops=989",
            "learner.peak_flops: must be a number from 1e+09 to 1e+18, or null (is 989)",
        ),
    ],
)
def test_a_mistake_names_key_value_and_what_is_allowed(path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])

    told = str(caught.value).removeprefix(f"{path}: ")
    assert told.replace(" (on the command line)", "") == message


def test_a_folder_whose_name_is_not_utf_8_is_refused(path, tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"\xfcber")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"run.directory: the path .*/runs is not UTF-8; give"):
        load_config(path)


def test_a_mistake_of_the_command_line_is_told_as_its_own(path):
    path.write_text(path.read_text().replace("student:", "learner: {lr: -1}\nstudent:"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["learner.lrr=1", "run.seed=-1"])

    lines = str(caught.value).removeprefix(f"{path}: ").splitlines()
    told = {line.partition(":")[0]: line.endswith(" (on the command line)") for line in lines}
    assert told == {"learner.lr": False, "learner.lrr": True, "run.seed": True}


def test_an_item_of_a_list_is_set_by_its_name_too(path):
    assert load_config(path, ["teachers.teacher.dtype=bfloat16"]).teachers[0].dtype == "bfloat16"
    named = [
        "teachers=[{name: a, model: t, sources: [x]}, {name: b, model: t}]",
        "teachers.b.replicas=3",
    ]
    assert [teacher.replicas for teacher in load_config(path, named).teachers] == [1, 3]

    with pytest.raises(
        ConfigError, match=r"teachers is a list; write teachers.0.c for its first item"
    ):
        load_config(path, [*named, "teachers.c.replicas=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "loss.reverse_kl={kind: sampled, reward: {function: maths}}",
            "loss.reverse_kl.reward.function: must be package.module:name, such as "
            "my_rewards:score (is 'maths'), or one of exact, math; did you mean math?",
        ),
        (
            "loss.reverse_kl={kind: sampled, reward: {function: math, options: {a: 1}}}",
            "loss.reverse_kl.reward.options: go to a function of yours; math takes none",
        ),
        ("loss.gate=custom", "loss.gate.function: is required"),
        (
            "loss.gate={kind: custom, function: exact}",
            "loss.gate.function: must be package.module:name, such as my_rewards:score (is 'exact')",
        ),
        (
            "flow.filter={function: 'my filter:keep'}",
            "flow.filter.function: must be package.module:name, such as my_rewards:score (is 'my "
            "filter:keep')",
        ),
    ],
)
def test_a_function_is_written_as_an_import_path(path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override, "rollout.samples_per_prompt=2"])

    told = str(caught.value).removeprefix(f"{path}: ")
    assert told.replace(" (on the command line)", "") == message


def test_the_functions_of_a_user_are_known_by_their_keys(path):
    reward = "loss.reverse_kl={kind: sampled, reward: {function: exact}}"
    several = ["rollout.samples_per_prompt=2", "flow.filter={function: 'filters:keep'}"]
    gate = "loss.gate={kind: custom, function: 'my.gates:narrow', options: {tau: 1.5}}"
    config = load_config(path, [reward, gate, *several])

    assert config.functions == {
        "flow.filter.function": "filters:keep",
        "loss.gate.function": "my.gates:narrow",
    }
    assert load_config(path, ["loss.gate=hard"]).functions == {}


def test_a_function_may_be_null_or_in_a_list():
    class Part(Section):
        function: FunctionName | None = None
        grader: GraderName = "math"

    class Whole(Section):
        parts: tuple[Part, ...]

    whole = Whole(parts=(Part(), Part(function="my.rows:all", grader="my:grader")))
    assert dict(functions_of(whole)) == {
        "parts.1.function": "my.rows:all",
        "parts.1.grader": "my:grader",
    }


def test_a_reward_compares_samples_of_one_batch(path):
    sampled = [
        "loss.reverse_kl={kind: sampled, reward: {function: exact}}",
        "rollout.samples_per_prompt=2",
    ]
    assert load_config(path, sampled).loss.reward.weight == 1.0
    assert load_config(path, ["loss.reverse_kl={kind: topk_tail}"]).loss.reward is None
    with pytest.raises(ConfigError, match=r"flow.lookahead 0 \(is 1\)"):
        load_config(path, [*sampled, "flow={batch_prompts: 8, max_staleness: 1, lookahead: 1}"])


ZERO = "learner.deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        (0, "offload_optimizer.device=cpu", "offload_optimizer: needs zero_stage 1 or more (is 0)"),
        (2, "offload_param.device=cpu", "offload_param: needs zero_stage 3 or more (is 2)"),
        (
            3,
            "offload_optimizer.device=nvme",
            "offload_optimizer: must be {device: cpu} or {device: none} (is nvme)",
        ),
        (
            3,
            "offload_param={device: nvme, nvme_path: /f}",
            "offload_param: must be {device: cpu} or {device: none} (is nvme)",
        ),
        (
            3,
            "offload_param=true",
            "offload_param: must be {device: cpu} or {device: none} (is true)",
        ),
        (
            3,
            "offload_optimizer={device: cpu, ratio: 0.5}",
            "offload_optimizer.ratio: cannot be set here: ",
        ),
        (
            3,
            "cpu_offload=true",
            "cpu_offload: cannot be set here: write offload_optimizer: {device: cpu} or ",
        ),
        ("auto", "offload_optimizer.device=nvme", "offload_optimizer: must be {device: cpu} or "),
        ("auto", "offload_param={device: cpu}", None),
        (0, "offload_optimizer.device=none", None),
        (1, "offload_optimizer.device=cpu", None),
        (3, "offload_param={device: cpu, pin_memory: false}", None),
    ],
)
def test_offloading_that_cannot_work_is_refused(path, stage, override, message):
    overrides = [f"learner.zero_stage={stage}", f"{ZERO}.{override}"]
    if message is None:
        load_config(path, overrides)
        return

    with pytest.raises(ConfigError, match=re.escape(f"{path}: {ZERO}.{message}")):
        load_config(path, overrides)


def test_a_missing_key_and_a_broken_file_are_named(path, tmp_path):
    tree = yaml.safe_load(MINIMAL)
    del tree["student"]["model"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"student.model: is required"):
        load_config(path)

    with pytest.raises(
        ConfigError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)"
    ):
        load_config(tmp_path / "nowhere.yaml")

    path.write_text("- 1")
    with pytest.raises(ConfigError, match=r"must be a mapping of sections \(is \[1\]\)"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.batches=1_000", 1000),
        ("run.batches=1e3", 1000),
        ("run.batches=0x10", 16),
        ("learner.lr=1e-5", 1e-5),
        ("run.name=12345", "12345"),
        ("run.name=2024_01", "2024_01"),
        ("run.name=1.10", "1.10"),
        ("run.name=010", "010"),
        ("prompts.suffix=1:30", "1:30"),
        ("run.name=no", "no"),
        ("run.name=true", "true"),
        ("run.name=2024-01-05", "2024-01-05"),
        ("run.seed=18446744073709551615", 2**64 - 1),
        ('prompts.suffix=": x"', ": x"),
        ("prompts.suffix='#1'", "#1"),
        ("student.lora.rank=4", 4),
        ("telemetry.trackers=wandb", ["wandb"]),
        ("telemetry.trackers=", []),
        ("learner.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("learner.zero_stage=2", 2),
        ("learner.activation_checkpointing=yes", True),
        ("learner.activation_checkpointing=Off", False),
        ("teachers.0.sources=math", ("math",)),
        ("teachers.0.sources=[1, no, x]", ("1", "no", "x")),
        ("teachers.0.eos_remap={0x10: 1_0}", {16: 10}),
        ("rollout.vllm=", {}),
        (
            "rollout.vllm={a: {3: 1e-3, b: 2024-01-01, c: '1e-3', d: null}}",
            {"a": {3: 1e-3, "b": "2024-01-01", "c": "1e-3", "d": None}},
        ),
    ],
)
def test_a_value_is_read_as_its_key_means_it(path, tmp_path, override, value):
    config = load_config(path, [override])
    found = config
    for part in override.partition("=")[0].split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)

    assert (found, type(found)) == (value, type(value))
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("loss.gate=quantile", "loss.gate={kind: quantile}"),
        ("loss.gate=", "loss.gate={kind: hard}"),
        ("loss.forward_kl=tail", "loss.forward_kl={kind: tail}"),
        ("loss.reverse_kl=none", "loss.reverse_kl={kind: none}"),
        ("student.lora=true", "student.lora={}"),
        ("student.lora=yes", "student.lora={}"),
        ("student.lora=off", "student.lora=null"),
        ("student.lora=false", "student.lora=null"),
        ("teachers={model: x}", "teachers=[{model: x}]"),
        ("learner=null", "learner={}"),
        ("loss.gate={tau: 0.5}", "loss.gate={kind: hard, tau: 0.5}"),
        ("loss.gate.tau=0.5", "loss.gate={kind: hard, tau: 0.5}"),
        ("loss.forward_kl={}", "loss.forward_kl={kind: renormalized}"),
        ("loss.reverse_kl={clip: 0.1}", "loss.reverse_kl={kind: sampled, clip: 0.1}"),
    ],
)
def test_a_short_form_is_the_whole_one(path, short, whole):
    assert load_config(path, [short]) == load_config(path, [whole])


def test_an_override_reaches_into_a_short_form(path, tmp_path):
    path.write_text(
        MINIMAL.replace("[{model: models/t}]", "{model: models/t}")
        + "loss: {gate: hard}\nlearner:\n"
    )
    config = load_config(
        path, ["loss.gate.tau=0.5", "teachers.0.name=n", "learner.lr=1e-4", "student.lora.rank=2"]
    )
    assert (config.loss.gate.tau, config.teachers[0].name) == (0.5, "n")
    assert (config.learner.lr, config.student.lora.rank) == (1e-4, 2)


@pytest.mark.parametrize(
    ("overrides", "whole"),
    [
        (["loss.gate=quantile", "loss.gate.top=0.3"], "loss.gate={kind: quantile, top: 0.3}"),
        (["loss.gate.tau=0.3", "loss.gate.kind=sigmoid"], "loss.gate={kind: sigmoid, tau: 0.3}"),
        (["loss.gate.top=0.3", "loss.gate.kind=quantile"], "loss.gate={kind: quantile, top: 0.3}"),
        (["student.lora=true", "student.lora.rank=8"], "student.lora={rank: 8}"),
        (["student.lora=false", "student.lora.rank=8"], "student.lora={rank: 8}"),
        (["teachers={model: x}", "teachers.0.name=n"], "teachers=[{model: x, name: n}]"),
        (["learner=", "learner.lr=0.1"], "learner={lr: 0.1}"),
        (
            ["rollout.vllm={seed: 1}", "rollout.vllm.block_size=16"],
            "rollout.vllm={seed: 1, block_size: 16}",
        ),
    ],
)
def test_an_override_reaches_into_the_short_form_of_another(path, overrides, whole):
    assert load_config(path, overrides) == load_config(path, [whole])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("flow: {batch_prompts: 1}", "flow stands twice (lines 8 and 9): remove one"),
        ("learner: {lr: 0.1,\n  lr: 0.2}", "learner.lr stands twice (lines 9 and 10): remove one"),
        ("learner: {lr: 0.1, lr: 0.1}", "learner.lr stands twice (both in line 9): remove one"),
        (
            "learner: {deepspeed: {a: [{b: 1, b: 2}]}}",
            "learner.deepspeed.a.0.b stands twice (both in line 9): remove one",
        ),
        ("x-held: {a: 1, a: 2}", "x-held.a stands twice (both in line 9): remove one"),
        ("learner: &l {deepspeed: {a: *l}}", "line 9: learner.deepspeed.a contains itself"),
        ("learner: " + "[" * 1500, "is nested more than 64 levels deep"),
        ("learner: !!set {a}", "line 9: the tag !!set means nothing here"),
        (
            "learner: !!python/name:os.system x",
            "line 9: the tag !!python/name:os.system means nothing here",
        ),
        (
            "? [a]\n: 1",
            "line 9: a list or mapping cannot be a key; quote a text that begins with { or [",
        ),
        ("learner: {lr: *none}", "is not YAML: line 9: found undefined alias 'none'"),
        ("learner:\n\tlr: 1", "is not YAML: line 10: a tab: indent with spaces"),
        ("learner:\n  lr:0.1\n  ranks: 1", "is not YAML: line 10: no space after the colon"),
        (
            "learner:\n  lr: 0.1\n  ranks:1\nloss:\n",
            "is not YAML: line 11: no space after the colon",
        ),
        ("learner:\n  lr: 0.1\n  ranks\nloss:\n", "is not YAML: line 11: no colon after the key"),
        ("x-a:1\nx-b: 2", "is not YAML: line 9: no space after the colon"),
        ("x-a: 'b\nx-c: d\nx-e: f", "is not YAML: line 9: a quote is never closed"),
        ('x-a: "b\nx-c: d\nx-e: f', "is not YAML: line 9: a quote is never closed"),
        (
            "x-a: [1, 2\nx-b: 3",
            "is not YAML: line 9: a [ is never closed, or a comma is missing in it",
        ),
        (
            "x-a: {b: 1, c: 2\n\n",
            "is not YAML: line 9: a { is never closed, or a comma is missing in it",
        ),
        (
            "x-a:\n  b: 1\n c: 2",
            "is not YAML: line 11: indented differently from the lines around it",
        ),
        ("x-a: 1\n  b: 2", "is not YAML: line 10: indented differently from the keys around it"),
        (
            "x-a: b: c",
            "is not YAML: line 9: a second colon: quote a text that holds a colon and a space",
        ),
        (
            "x-a: 'it's'",
            "is not YAML: line 9: text after a closed quote: quote all of it, and write a "
            "quote within as two",
        ),
        ("x-a: @b", "is not YAML: line 9: quote a text that begins with @"),
        ('learner: "\\ud800"', "line 9: a \\u escape there is half a character"),
        ('learner: "\\U00ffffff"', "is not YAML: chr() arg not in range(0x110000)"),
        ("learner: {<<: 1}", "line 9: << merges mappings; write <<: *name or <<: [*a, *b]"),
        (
            "3: 4",
            "3: unknown key; allowed here: checkpoint, cluster, evaluation, flow, guard, learner, loss, "
            "prompts, rollout, run, student, teachers, telemetry, weights",
        ),
        (
            "'[key]': 1",
            "[key]: unknown key; allowed here: checkpoint, cluster, evaluation, flow, guard, learner, "
            "loss, prompts, rollout, run, student, teachers, telemetry, weights",
        ),
        (
            "loss: {gate: {kind: hard, hard: 1}}",
            "loss.gate.hard: unknown key; allowed here: kind, tau",
        ),
        (
            "learner.lr: 1e-4",
            "learner.lr: unknown key; names with dots are for --set; here write learner: {lr: ...}",
        ),
        (
            "---\na: 1",
            "is not YAML: line 9: expected a single document in the stream, but "
            "found another document",
        ),
    ],
)
def test_a_file_that_is_no_tree_says_where(path, added, message):
    path.write_text(f"{MINIMAL}{added}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value).removeprefix(f"{path}: ") == message


@pytest.mark.parametrize(
    ("text", "written", "meant"),
    [
        (r"in \boxed{}", r"\b (at position 3)", r"\boxed"),
        (r"\frac", r"\f (at position 0)", r"\frac"),
        (r"\0", r"\0 (at position 0)", r"\0"),
        (r"\theta", r"\t (at position 0)", r"\theta"),
        (r"\rightarrow", r"\r (at position 0)", r"\rightarrow"),
        (r"\Nabla", r"\N (at position 0)", r"\Nabla"),
        (r"\x01", r"\x01 (at position 0)", r"\x01"),
    ],
)
@pytest.mark.parametrize("key", ["prompts.suffix", "teachers.0.template"])
def test_a_backslash_that_double_quotes_took_is_refused(path, key, text, written, meant):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f'{key}="{text}"'])

    assert str(caught.value) == (
        f"{path}: {key}: holds the control character {written}, which double quotes in YAML "
        f"make of {meant}; double the backslash (\\{meant}), or write the text in single "
        "quotes (on the command line)"
    )


BLOCKS = MINIMAL.replace(
    "prompts: {data: a.jsonl, held_out: b.jsonl, max_tokens: 100}",
    "prompts:\n  data: a.jsonl\n  held_out: b.jsonl\n  max_tokens: 100\n  # more",
).replace("teachers: [{model: models/t}]", "teachers:\n- model: models/t\n  # of it")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "suffix: End with a line #### and the number.",
            "prompts.suffix: #### behind End with a line",
        ),
        ("suffix: Answer #### N", "prompts.suffix: #### behind Answer"),
        ("suffix: #### N", "prompts.suffix: #### at its beginning"),
        ("suffix: End with\n    a line ## now", "prompts.suffix: ## behind End with a line"),
        (
            "template_options: \n    note: Write a ## heading",
            "prompts.template_options.note: ## behind Write a",
        ),
    ],
)
def test_a_text_that_a_comment_cuts_short_is_refused(path, line, message):
    path.write_text(BLOCKS.replace("# more", line))
    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == (
        f"{path}: {message} begins a comment in YAML, so that the rest of the line is no "
        "part of the text; put quotes around all of the text, or write the comment with one "
        "# if it is one"
    )


def test_a_template_that_is_all_comment_is_refused(path):
    path.write_text(BLOCKS.replace("# of it", "template: ### {{ prompt }}"))
    with pytest.raises(
        ConfigError, match=r"teachers.0.template: ### at its beginning begins a comment"
    ):
        load_config(path)


@pytest.mark.parametrize("comment", ["# why", "## why", "##### why #####", "#why"])
def test_ordinary_comments_stay_comments(path, comment):
    more = (
        f"learner: {comment}\n  lr: 1e-5 {comment}\nloss: {comment}\ntelemetry:\n  host: a "
        f"{comment}\n"
    )
    path.write_text(BLOCKS.replace("# more", f"suffix: 'a b' {comment}") + more)
    config = load_config(path)
    assert (config.telemetry.host, config.learner.lr, config.prompts.suffix) == ("a", 1e-5, "a b")


def test_one_mark_behind_words_is_a_comment(path):
    path.write_text(BLOCKS.replace("# more", "suffix: In one word. # short"))
    assert load_config(path).prompts.suffix == "In one word."


def test_line_ends_and_tabs_of_a_text_are_taken(path):
    assert (
        load_config(path, [r'prompts.suffix="\n\ta\r\n\\boxed{}"']).prompts.suffix
        == "\n\ta\r\n\\boxed{}"
    )


def test_aliases_that_grow_without_end_are_a_message(path):
    levels = [f"x-{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9)]
    path.write_text("\n".join([MINIMAL, "x-0: &a0 lol", *levels]))
    with pytest.raises(ConfigError, match="its aliases expand to more than 100000 values"):
        load_config(path)


def test_anchors_and_merge_keys_are_resolved_and_their_holders_ignored(path):
    path.write_text(
        f"x-cheap: &cheap {{cpus: 0.25, threads: 2}}\nx-more: &more {{cpus: 9, timeout_s: 5}}\n{MINIMAL}"
        "learner: {<<: [*cheap, *more], threads: 3}\n"
    )
    learner = load_config(path).learner
    assert (learner.cpus, learner.threads, learner.timeout_s) == (0.25, 3, 5.0)


def test_every_mistake_is_said_at_once(path):
    path.write_text(MINIMAL.replace("batches: 2", "batches: 010") + "learner: {lr: fast}\nx: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["loss.gate=hrad"])

    keys = [
        line.partition(": ")[0] for line in str(caught.value).removeprefix(f"{path}: ").splitlines()
    ]
    assert sorted(keys) == ["learner.lr", "loss.gate.kind", "run.batches", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping of sections (is empty)"),
        (b"# nothing\n", "must be a mapping of sections (is empty)"),
        (b"run", "must be a mapping of sections (is run)"),
        (b"run: \xff", "is not YAML: byte 6 is no UTF-8; save it as UTF-8 text"),
        (b"\0", "is not YAML: unacceptable character #x0000: special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_says_what_it_is(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == f"{path}: {message}"


def test_a_byte_order_mark_is_no_mistake(path):
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).run.name == "r"


def test_a_secret_written_where_its_name_belongs_is_not_repeated(path):
    server = "{url: 'http://h', model: m, api_key_env: sk-123}"
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"teachers.0={{model: x, backend: openai, server: {server}}}"])

    assert "sk-123" not in str(caught.value).replace(server, "")


# --- whatever stands in the file --------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["hard", "none", "1:30", "010", "no", "1_000", ".nan", "~", "<<", "kind", "0x1", "-"]
    ),
)
KEYS = st.one_of(
    st.sampled_from([*Config.model_fields, "x-a", "kind", "name", "model"]), st.text(max_size=5)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            KEYS | st.integers(0, 9),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KNOBS = [
    line.replace("[]", ".0")
    for line in (Path(__file__).parents[1] / "house/knobs.txt").read_text().splitlines()
]
MANY = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def loads_or_is_refused(folder, text):
    """Whether a text is a config; one that is loads again from what it is written as."""
    file, again = folder / "any.yaml", folder / "again.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))

    try:
        config = load_config(file)
    except ConfigError:
        return False

    again.write_text(dump_config(config))
    assert load_config(again) == config

    return True


@MANY
@given(st.text(st.sampled_from("{}[]:,&*!?|>-#'\"%@` \n\tab01_.<") | st.characters(), max_size=40))
def test_any_text_is_a_config_or_one_message(tmp_path_factory, text):
    loads_or_is_refused(tmp_path_factory.getbasetemp(), text)


@MANY
@given(st.sampled_from(KNOBS), TREES)
def test_any_value_of_any_key_is_taken_or_one_message(tmp_path_factory, knob, value):
    tree = yaml.safe_load(MINIMAL)
    tree["prompts"] = {"data": [{"data": "a"}], "held_out": [{"data": "b"}]}
    *parents, last = knob.split(".")
    node = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})

    node[last] = value
    loads_or_is_refused(tmp_path_factory.getbasetemp(), yaml.safe_dump(tree, allow_unicode=True))


@MANY
@given(st.dictionaries(KEYS, TREES, max_size=13))
def test_any_tree_is_a_config_or_one_message(tmp_path_factory, tree):
    loads_or_is_refused(tmp_path_factory.getbasetemp(), yaml.safe_dump(tree, allow_unicode=True))


def test_the_property_itself_sees_a_config(tmp_path):
    assert loads_or_is_refused(tmp_path, MINIMAL)
    assert not loads_or_is_refused(tmp_path, "run: 1")


# --- notes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("run.batches=10_000_000", "run.batches: 10000000 are 116 days at a batch a second"),
        (
            "learner.warmup_batches=60",
            "learner.warmup_batches: 60 is not below run.batches 60; learner.lr is reached "
            "at the end or never",
        ),
        (
            "loss.alpha_warmup={start: 0.1, batches: 99}",
            "loss.alpha_warmup.batches: 99 is not below run.batches 60; loss.alpha is "
            "reached at the end or never",
        ),
        (
            "loss.alpha_warmup.start=0.1",
            "loss.alpha_warmup.start: has no effect while loss.alpha_warmup.batches is 0",
        ),
        (
            "checkpoint.every=61",
            "checkpoint.every: 61 is above run.batches 60; the only one is at the end",
        ),
        ("learner.lr=0.2", "learner.lr: 0.2 moves every weight by about as much in each step"),
        (
            "learner.betas=[0.99, 0.9]",
            "learner.betas: 0.99 before 0.9; the first is usually the smaller",
        ),
        ("loss.top_k=1", "loss.top_k: the forward KL compares the teacher's first candidate alone"),
        ("loss.alpha=0", "loss.gate: has no effect while loss.alpha is 0"),
        (
            "teachers.0.temperature=0.5",
            "teachers.teacher.temperature: 0.5 differs from rollout.temperature 1; the "
            "student learns a sharper or flatter distribution than its own",
        ),
        (
            "flow.max_staleness=65",
            "flow.max_staleness: trajectories may be 65 versions behind what is trained",
        ),
        (
            r"prompts.suffix='\n\nThink.'",
            r"prompts.suffix: holds \n as two characters, and no line end; a line end needs double "
            r"""quotes in YAML, on the command line --set 'prompts.suffix="...\n..."'""",
        ),
        (
            "flow.filter={function: 'm:keep'}",
            "flow.filter: what it drops moves all later responses up, so that two batches may share "
            "those to one prompt; a reward is compared within its batch, and one that is alone there "
            "gives no advantage",
        ),
        (
            "prompts.held_out=a.jsonl",
            "prompts.held_out: is prompts.data; held-out numbers are then those of training",
        ),
    ],
)
def test_what_is_odd_and_can_be_meant_is_a_note(path, override, note):
    base = ["run.batches=60"]
    if "flow.filter" in override:  # without a reward nothing is odd about it
        assert list(oddities(load_config(path, [*base, override]))) == []
        base += ["rollout.samples_per_prompt=2", "loss.reverse_kl.reward={function: exact}"]

    assert list(oddities(load_config(path, [*base, r"prompts.suffix='as \nabla f'"]))) == []
    assert list(oddities(load_config(path, [*base, override]))) == [note]


@pytest.mark.parametrize(
    ("data", "held_out", "is_same"),
    [
        ("{function: 'm:rows'}", "{function: 'm:rows'}", True),
        ("{function: 'm:rows'}", "{function: 'm:rows', options: {split: test}}", False),
        ("{data: a.jsonl, columns: {prompt: q}}", "a.jsonl", False),
        ("{data: a.jsonl, weight: 2, source: s}", "a.jsonl", True),
    ],
)
def test_held_out_prompts_are_those_of_training_by_all_that_chooses_rows(
    path, data, held_out, is_same
):
    overrides = ["run.batches=60", f"prompts.data={data}", f"prompts.held_out={held_out}"]
    notes = list(oddities(load_config(path, overrides)))
    assert any("is prompts.data" in note for note in notes) == is_same


# --- evaluation


@pytest.fixture
def evaluated(tmp_path):
    often = "{name: often, data: o.jsonl, samples: 8, every: 2, max_response_tokens: 5000}"
    path = fakes.write_config(
        tmp_path,
        batches=20,
        more=f"evaluation: {{every: 5, benchmarks: [{{name: m, data: m.jsonl}}, {often}]}}\n"
        "learner: {token_budget: 2048}\n",
    )
    return lambda *overrides: load_config(path, overrides)


def test_each_name_is_due_at_its_own_period(evaluated):
    evaluation = evaluated().evaluation

    def due(name):
        return [step for step in range(11) if evaluation.is_due(name, step)]

    assert evaluation.names == ("held_out", "m", "often")
    assert due("held_out") == due("m") == [0, 5, 10]
    assert due("often") == [0, 2, 4, 6, 8, 10]
    seldom = evaluated("evaluation.every=null").evaluation
    assert seldom.period("held_out") is None
    assert [step for step in range(11) if seldom.is_due("m", step)] == [0]
    assert seldom.period("often") == 2


def test_engines_hold_the_longest_answer_and_the_learner_the_longest_it_reads(evaluated):
    config = evaluated()
    assert config.max_sequence_tokens == 1024 + 5000
    assert config.max_response_tokens == 1024
    assert config.max_teacher_tokens(config.teachers[0]) == 2048


def test_held_out_responses_are_as_long_as_those_of_training_unless_a_key_says_otherwise(evaluated):
    config = evaluated("rollout.max_response_tokens=300")
    assert config.held_out_response_tokens == config.max_response_tokens == 300
    longer = evaluated("rollout.max_response_tokens=300", "evaluation.max_response_tokens=700")
    assert longer.held_out_response_tokens == longer.max_response_tokens == 700
    expected = r"is below prompts.max_tokens \+ evaluation.max_response_tokens = 3024; "
    with pytest.raises(ConfigError, match=expected):
        evaluated("evaluation.max_response_tokens=2000")


def test_the_best_can_be_found_by_whatever_is_measured(evaluated):
    for metric in ("held_out/forward_kl", "m/avg_at_n", "often/pass_at_2", "often/distinct_2"):
        keep_best = evaluated(f"checkpoint.keep_best={{metric: {metric}, mode: max}}").checkpoint
        assert keep_best.keep_best.n == 1

    with pytest.raises(ConfigError, match="m has no pass_at_8; it has avg_at_n, response_tokens"):
        evaluated("checkpoint.keep_best={metric: m/pass_at_8, mode: max}")


HALF_A_GPU = "rollout={gpus: 0.5, vllm: {gpu_memory_utilization: 0.4}}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "auto"),
        (["learner.gpus=1", "rollout.gpus=1"], "nccl"),
        (["learner.gpus=1", "rollout={gpus: 2, vllm: {tensor_parallel_size: 2}}"], "nccl"),
        (["learner.gpus=0.5", HALF_A_GPU], "auto"),
        (["learner.gpus=1", HALF_A_GPU], "auto"),
        (["learner.gpus=1"], "auto"),
        (["learner.gpus=1", "rollout.gpus=1", "weights.backend=gloo"], "gloo"),
        (["weights.backend=shared"], "shared"),
    ],
)
def test_weights_go_from_gpu_to_gpu_where_no_gpu_is_shared(path, overrides, expected):
    assert load_config(path, overrides).weights_backend == expected


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((3, 1), (3, 1)),
        ((0.75, 0.25), (3, 1)),
        ((0.3, 0.7), (3, 7)),
        ((7473, 1), (7473, 1)),
        ((0.333333, 0.666667), (33333, 66667)),
        ((1, 1_000_000), (1, 100_000)),
        ((7473, 93733, 860123), (259, 3250, 29824)),  # rows of three files
        ((1.1, 2.37, 3.14159265), (16637, 35846, 47516)),
    ],
)
def test_weights_are_turns_and_a_ratio_of_many_is_rounded(path, weights, turns):
    parts = ", ".join(f"{{data: '{n}', weight: {weight}}}" for n, weight in enumerate(weights))
    found = load_config(path, [f"prompts.data=[{parts}]"]).prompts.turns
    assert sum(found) <= 100_000 + len(found)
    assert [n / sum(found) for n in found] == pytest.approx(
        [weight / sum(weights) for weight in weights], abs=1e-5
    )
    assert found == turns


@pytest.mark.parametrize("value", ["|", ">", "|-", " | a"])
def test_a_mark_of_a_block_without_its_lines_is_a_mistake(path, value):
    with pytest.raises(
        ConfigError, match="begins a text in the lines below, and there are none; put"
    ):
        load_config(path, [f"prompts.suffix={value}"])

    assert load_config(path, ["prompts.suffix=|\n  a\n  b\n"]).prompts.suffix == "a\nb\n"
    assert load_config(path, ["prompts.suffix='|'"]).prompts.suffix == "|"
