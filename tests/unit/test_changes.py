"""What may change when a run goes on: every key of the config is decided, once."""

from pathlib import Path

import fakes
import pytest

from eopd.config import load_config
from eopd.run.changes import TABLE, changes, kind_of

FILE = Path(__file__).parents[1] / "house" / "knobs.txt"
KNOBS = FILE.read_text(encoding="utf-8").split()
NATIVE = (
    "learner.deepspeed",
    "rollout.vllm",
    "teachers[].vllm",
    "teachers[].template_options",
)

DECIDED = {
    "noted": """
        evaluation.benchmarks[].columns
        evaluation.benchmarks[].data[].columns
        evaluation.benchmarks[].data[].data
        evaluation.benchmarks[].data[].function
        evaluation.benchmarks[].data[].options
        evaluation.benchmarks[].data[].source
        evaluation.benchmarks[].every
        evaluation.benchmarks[].grader
        evaluation.benchmarks[].max_response_tokens
        evaluation.benchmarks[].name
        evaluation.benchmarks[].prompts
        evaluation.benchmarks[].samples
        evaluation.benchmarks[].stop
        evaluation.benchmarks[].temperature
        evaluation.benchmarks[].top_p
        evaluation.max_response_tokens
        evaluation.prompts
        evaluation.seed
        flow.batch_prompts
        flow.filter.function
        flow.filter.options
        flow.lookahead
        flow.max_staleness
        learner.betas
        learner.deepspeed
        learner.lr
        learner.max_grad_norm
        learner.optimizer_steps_per_batch
        learner.schedule
        learner.warmup_batches
        learner.weight_decay
        loss.alpha
        loss.alpha_warmup.batches
        loss.alpha_warmup.start
        loss.forward_kl.kind
        loss.gate.function
        loss.gate.kind
        loss.gate.options
        loss.gate.rate
        loss.gate.scale
        loss.gate.tau
        loss.gate.top
        loss.reverse_kl.clip
        loss.reverse_kl.importance_cap
        loss.reverse_kl.kind
        loss.reverse_kl.reward.function
        loss.reverse_kl.reward.options
        loss.reverse_kl.reward.weight
        loss.top_k
        rollout.keep_kv
        rollout.max_response_tokens
        rollout.temperature
        rollout.vllm
        run.batches
        student.lora.alpha
        teachers[].backend
        teachers[].dtype
        teachers[].entropy_bound
        teachers[].eos_remap
        teachers[].head_dtype
        teachers[].max_prompt_tokens
        teachers[].model
        teachers[].name
        teachers[].server.model
        teachers[].sources
        teachers[].temperature
        teachers[].template
        teachers[].template_options
        teachers[].vllm
    """,
    "never": """
        learner.zero_stage
        prompts.data[].weight
        rollout.samples_per_prompt
        run.seed
        student.dtype
        student.lora.rank
        student.lora.target_modules
    """,
    "contents": """
        prompts.columns
        prompts.data[].columns
        prompts.data[].data
        prompts.data[].function
        prompts.data[].options
        prompts.data[].source
        prompts.held_out[].columns
        prompts.held_out[].data
        prompts.held_out[].function
        prompts.held_out[].options
        prompts.held_out[].source
        prompts.max_tokens
        prompts.overlong
        prompts.suffix
        prompts.system
        prompts.template
        prompts.template_options
        student.model
    """,
}


def test_every_key_is_decided():
    """A new key must be put on one of these lists, or be one that changes nothing that is
    computed.
    """
    for kind, names in DECIDED.items():
        of_kind = [knob for knob in KNOBS if kind_of(knob) == kind]
        assert of_kind == sorted(names.split())


def test_every_entry_of_the_table_decides_something():
    for name, kind in TABLE.items():
        native = any(name.startswith(f"{option}.") for option in NATIVE)
        key = any(f"{knob}.".startswith(f"{name}.") for knob in KNOBS)
        assert native or key, f"{name} is no key"
        shorter = name.rpartition(".")[0]
        without = kind_of(shorter) if shorter else "noted"
        assert kind != without, f"{name} is {kind} without this entry"


@pytest.fixture
def config(tmp_path):
    path = fakes.write_config(
        tmp_path,
        batches=20,
        student="{model: /s}",
        teachers="[{model: /t, name: a.b, sources: [x]}, {model: /u, name: b}]",
        flow="{batch_prompts: 8, max_staleness: 2}",
        more="learner: {zero_stage: 1}",
    )
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            "learner.lr=0.1",
            ["learner.lr 1.0e-06 -> 0.1: noted"],
        ),
        (
            "learner.betas=[0.8, 0.9]",
            ["learner.betas [0.9, 0.999] -> [0.8, 0.9]: noted"],
        ),
        (
            "telemetry.port=null",
            ["telemetry.port 0 -> null: always"],
        ),
        (
            "telemetry.trackers=[tensorboard]",
            ["telemetry.trackers [] -> [tensorboard]: always"],
        ),
        (
            "teachers.0.temperature=2",
            ["teachers.a.b.temperature 1.0 -> 2.0: noted"],
        ),
        (
            "teachers.1.replicas=3",
            ["teachers.b.replicas 1 -> 3: always"],
        ),
        (
            "teachers.1.vllm={max_num_seqs: 4, seed: 1}",
            [
                "teachers.b.vllm.max_num_seqs null -> 4: always",
                "teachers.b.vllm.seed null -> 1: noted",
            ],
        ),
        (
            "teachers=[{model: /u, name: b}, {model: /t, name: a.b, sources: [x]}]",
            [],
        ),
        (
            "teachers=[{model: /u, name: b}]",
            ["teachers.a.b /t -> null: noted"],
        ),
        (
            "teachers=[{model: /t, name: a.b, sources: [x]}, {model: /u, name: c}]",
            [
                "teachers.b /u -> null: noted",
                "teachers.c null -> /u: noted",
            ],
        ),
        (
            "student.lora={rank: 4}",
            [
                "student.lora.alpha null -> 32.0: noted",
                "student.lora.rank null -> 4: never",
                "student.lora.target_modules null -> [all-linear]: never",
            ],
        ),
        (
            "loss.gate={kind: quantile, top: 0.1}",
            [
                "loss.gate.kind hard -> quantile: noted",
                "loss.gate.tau 0.8 -> null: noted",
                "loss.gate.top null -> 0.1: noted",
            ],
        ),
        (
            "rollout.vllm={gpu_memory_utilization: 0.5}",
            ["rollout.vllm.gpu_memory_utilization null -> 0.5: always"],
        ),
        (
            "rollout.vllm={quantization: fp8}",
            ["rollout.vllm.quantization null -> fp8: noted"],
        ),
        (
            "learner.ranks=2",
            ["learner.ranks 1 -> 2: always"],
        ),
        (
            "learner.deepspeed={zero_optimization: {overlap_"
            "comm: true, round_robin_gradients: true}}",
            [
                "learner.deepspeed.zero_optimization.overlap_comm null -> true: always",
                "learner.deepspeed.zero_optimization.round_robin_gradients null -> true: never",
            ],
        ),
        (
            "prompts.suffix=Think.",
            ["prompts.suffix '' -> Think.: contents"],
        ),
        (
            "run.name=other",
            ["run.name r -> other: always"],
        ),
        (
            "prompts.data=c",
            ["prompts.data a -> c: contents"],
        ),
        (
            "prompts.data={data: a, source: x, columns: {prompt: q}}",
            [
                "prompts.data.columns.prompt null -> q: contents",
                "prompts.data.source null -> x: contents",
            ],
        ),
        (
            "prompts.data=[{data: a, weight: 1}, {function: m:f, options: {n: 2}, weight: 2}]",
            [
                "prompts.data.0.weight null -> 1.0: never",
                "prompts.data.1.function null -> m:f: contents",
                "prompts.data.1.options.n null -> 2: contents",
                "prompts.data.1.weight null -> 2.0: never",
            ],
        ),
        (
            "prompts.held_out=[b, c]",
            ["prompts.held_out.1 null -> c: contents"],
        ),
    ],
)
def test_changes_are_named_in_the_words_of_the_config(config, overrides, found):
    named = changes(config(), config(overrides))
    assert [f"{change}: {change.kind}" for change in named] == found


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (1, 2, "always"),
        (2, 1, "always"),
        (1, 3, "never"),
        (0, 1, "never"),
    ],
)
def test_zero_1_and_2_shard_alike(config, before, after, kind):
    old = config(f"learner.zero_stage={before}")
    new = config(f"learner.zero_stage={after}")
    (change,) = changes(old, new)
    assert change.key == "learner.zero_stage"
    assert change.kind == kind


def test_states_may_be_offloaded(config):
    native = "learner.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"
    (change,) = changes(config(), config(native))
    assert str(change) == "learner.deepspeed.zero_optimization.offload_optimizer.device null -> cpu"
    assert change.kind == "always"


def test_round_robin_gradients_fix_the_number_of_ranks(config):
    native = "learner.deepspeed={zero_optimization: {round_robin_gradients: true}}"
    (change,) = changes(config(native), config(native, "learner.ranks=2"))
    assert str(change) == "learner.ranks 1 -> 2"
    assert change.kind == "never"
