"""YAML and overrides to a checked config: a mistake is one message that names key, value and what is allowed."""

import pytest
import yaml

from eopd.config import ConfigError, dump_config, load_config

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
    config = load_config(path, ["loss.gate={kind: always}", "teachers.0.temperature=0.7", "rollout.vllm.seed=3"])
    assert config.loss.gate.kind == "always"
    assert config.teachers[0].temperature == 0.7
    assert config.rollout.vllm == {"seed": 3}
    assert config.student.model.is_absolute() and config.run.path.is_absolute()
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


def test_alpha_grows_linearly_over_its_warm_up(path):
    loss = load_config(path, ["loss.alpha=2.0", "loss.alpha_warmup={start: 0.5, batches: 4}"]).loss
    assert [loss.alpha_at(b) for b in (0, 2, 4, 9)] == [1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=2", "rollout.engine: unknown key; did you mean engines?"),
        ("loss.gate={kind: hard, taw: 1}", "loss.gate.hard.taw: unknown key; did you mean tau?"),
        ("teachers.0.modle=x", "teachers.0.modle: unknown key; did you mean model?"),
        ("lerner={}", "lerner: unknown key; did you mean learner?"),
        ("learner.lr=-1", r"learner.lr: Input should be greater than 0 \(is -1\)"),
        ("loss.gate={kind: soft}", "loss.gate: .*'hard'.*"),
        ("learner.token_budget=150", "learner.token_budget 150 is below .* = 200"),
        ("flow.lookahead=1", "lookahead 1 is above max_staleness 0"),
        ("learner.ranks=9", "a batch of 8 trajectories cannot be cut into 1 optimiser steps on 9 ranks"),
        ("learner.deepspeed={train_batch_size: 4}", "train_batch_size cannot be set here"),
        ("learner.deepspeed={bfloat16: {enabled: true}}", "bfloat16 cannot be set here"),
        ("rollout.vllm={logprobs_mode: raw_logprobs}", "rollout: vllm: logprobs_mode cannot be set here"),
        ("teachers=[]", "teachers: there must be at least one"),
        ("teachers=[{model: a}, {model: b}]", "teachers: name 'teacher' is there twice"),
        ("teachers=[{model: a, name: a}, {model: b, name: b}]", "a and b name no sources; only one can be the default"),
        (
            "teachers=[{model: a, name: a, sources: [x, y]}, {model: b, name: b, sources: x}]",
            "teachers: source 'x' is there twice",
        ),
        ("teachers.0.backend=eopd", "teachers.0: backend eopd: needs a server section"),
        ("teachers.0.server={url: 'http://h'}", "teachers.0: backend vllm: takes no server section"),
        ("teachers.0={model: a, backend: eopd, server: {url: 'h:80'}}", "teachers.0.server.url: "),
        ("teachers.0={model: a, backend: eopd, server: {url: 'http://me:key@h'}}", "teachers.0.server.url: "),
        (
            "teachers.0={model: a, backend: eopd, server: {url: 'http://h'}, vllm: {seed: 1}}",
            "teachers.0: backend eopd: takes no vllm options",
        ),
        ("teachers.0={model: a, backend: openai, server: {url: 'http://h'}}", "server.model: backend openai needs"),
        (
            "teachers.0={model: a, backend: openai, temperature: 0.7, server: {url: 'http://h', model: m}}",
            "prompt log-probabilities of a stock server are always those at 1",
        ),
        ("teachers.0.max_prompt_tokens=5", "are of a teacher with a template"),
        ("teachers.0.vllm={runner: generate}", "teachers.0: vllm: runner cannot be set here"),
        ("learner.betas=[0.9, 2]", "learner.betas.1: Input should be less than 1"),
        ("weights.backend=nccl", "weights.backend nccl moves weights between GPUs"),
        ("learner.deepspeed={zero_optimization: {stage: 3}}", "zero_optimization.stage: set by zero_stage"),
        (
            "loss.reverse_kl={kind: sampled, reward: {grader: math}}",
            r"needs rollout.samples_per_prompt of 2 or more \(is 1\)",
        ),
        ("loss.reverse_kl={kind: none, reward: {grader: math}}", "reverse_kl.none.reward: unknown key"),
        ("student.dtype=float16", "student.dtype: Input should be 'auto', 'float32' or 'bfloat16'"),
        ("student.lora.rank=0", r"student.lora.rank: Input should be greater than or equal to 1 \(is 0\)"),
        ("student.lora={alpha: 0}", "student.lora.alpha: Input should be greater than 0"),
        ("student.lora={ranks: 4}", "student.lora.ranks: unknown key; did you mean rank?"),
        ("student.lora.target_modules=[]", "student.lora.target_modules: Tuple should have at least 1 item"),
        ("loss.alpha=.inf", "loss.alpha: Input should be a finite number"),
        ("run.name=a/b", "run.name: .*"),
        ("flow.batch_prompts", "must be section.key=value"),
        ("teachers.1.model=x", "must be an index below 1"),
        ("run.name.x=1", "run.name is a value, it has no key x"),
        ("run.seed=[", "the value is not YAML"),
    ],
)
def test_a_mistake_names_key_value_and_what_is_allowed(path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_a_reward_compares_samples_of_one_batch(path):
    sampled = ["loss.reverse_kl={kind: sampled, reward: {grader: exact}}", "rollout.samples_per_prompt=2"]
    assert load_config(path, sampled).loss.reward.weight == 1.0
    assert load_config(path, ["loss.reverse_kl={kind: topk_tail}"]).loss.reward is None
    with pytest.raises(ConfigError, match=r"flow.lookahead 0 \(is 1\)"):
        load_config(path, [*sampled, "flow={batch_prompts: 8, max_staleness: 1, lookahead: 1}"])


ZERO = "learner.deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        (0, "offload_optimizer.device=cpu", r"learner: deepspeed.*_optimizer: needs zero_stage 1 or more \(is 0\)"),
        (2, "offload_param.device=cpu", r"learner: deepspeed.*offload_param: needs zero_stage 3 or more \(is 2\)"),
        (3, "offload_optimizer.device=nvme", r"offload_optimizer: must be {device: cpu} or .* \(is 'nvme'\)"),
        (3, "offload_param={device: nvme, nvme_path: /f}", r"offload_param: must be {device: cpu} or .* \(is 'nvme'\)"),
        (3, "offload_param=true", r"offload_param: must be {device: cpu} or {device: none} \(is True\)"),
        (3, "offload_optimizer={device: cpu, ratio: 0.5}", "zero_optimization.offload_optimizer: ratio cannot be set"),
        (3, "cpu_offload=true", "zero_optimization: cpu_offload cannot be set here"),
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
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_a_missing_key_and_a_broken_file_are_named(path, tmp_path):
    tree = yaml.safe_load(MINIMAL)
    del tree["student"]["model"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"student.model: is required"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "nowhere.yaml")
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping of sections, is list"):
        load_config(path)
