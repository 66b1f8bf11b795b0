"""What ``eopd plan`` reckons: shapes of models, memory by formulas, what fits, and what balances.

Numbers are computed by hand, or by an oracle that shares nothing with the code: headers of
safetensors files, and the tensors that autograd saves.
"""

import dataclasses
import json
import math
from dataclasses import replace

import fakes
import model_facts
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from eopd.config import ConfigError, LearnerConfig, LoraConfig, load_config
from eopd.hub import require_cached_directory
from eopd.learner.attention import VARLEN, choose_attention, sequences_of
from eopd.planning.architecture import Architecture, read_architecture
from eopd.planning.balance import Stage, balance, best_counts, stages_of
from eopd.planning.memory import (
    activations,
    kv_bytes,
    learner_states,
    loss_buffers,
    passes,
)
from eopd.planning.needs import Hardware, Models, learner_need, rollout_need, teacher_need
from eopd.planning.plan import plan_run
from eopd.planning.traffic import traffic_of
from eopd.planning.units import read_bandwidth, read_bytes, read_rates
from eopd.preflight.weights import read_tensors
from eopd.types import Exact, ScoredTrajectory, TeacherSignal

GB = 10**9


def qwen3(**changes):
    """Qwen3-0.6B, from its published config."""
    return Qwen3Config.from_dict(model_facts.QWEN3_06B | changes)


QWEN3_8B = Qwen3Config.from_dict(model_facts.QWEN3_8B)
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}


@pytest.fixture
def shapes(tmp_path):
    """A function that reads the shapes of a model of a config."""

    def read(config, lora=None):
        directory = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        config.save_pretrained(directory)
        return read_architecture(directory, lora)

    return read


# --- shapes


@pytest.mark.parametrize(
    ("config", "parameters"), [(qwen3(), 596_049_920), (QWEN3_8B, 8_190_735_360)]
)
def test_parameters_are_those_that_are_published(shapes, config, parameters):
    assert shapes(config).parameters == parameters


def test_layers_are_those_of_the_text(shapes):
    """Gemma 3 has a vision tower in front, whose layers are of another shape."""
    text = Gemma3TextConfig(num_hidden_layers=2)
    alone, behind = shapes(text), shapes(Gemma3Config(text_config=text))
    sizes = [(one.norms, one.norm_kind, one.mlp_kept, one.layers) for one in (alone, behind)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_parameters_are_those_of_the_files(tiny_model, family):
    directory = tiny_model(family, seed=0)
    tensors = read_tensors(directory, standard_names=True)
    model = read_architecture(directory)
    assert model.parameters == sum(math.prod(info.shape) for info in tensors.values())
    assert model.largest_tensor == max(math.prod(info.shape) for info in tensors.values())


def test_adapters_are_what_is_trained(shapes):
    """Two layers, rank 4: q 64 + 96, k and v 64 + 48 each, o 96 + 64, gate and up 64 + 160 each,
    down 160 + 64: 1,216 a layer and rank.
    """
    model = shapes(LlamaConfig(**TINY), LoraConfig(rank=4))
    assert model.trained == 2 * 4 * 1216
    assert model.parameters == shapes(LlamaConfig(**TINY)).parameters
    assert model.held == model.parameters + 2 * 4 * 1216


def test_a_config_that_is_no_model_names_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ConfigError, match=r"config.json: model_type is .abacus."):
        read_architecture(tmp_path)


# --- activations, beside what autograd saves


def saved_bytes(config, dtype, tokens, attention=None):
    """Bytes of all storages that autograd saves of a packed forward pass, without parameters."""
    chosen = choose_attention(config.to_dict())
    config._attn_implementation = attention or (VARLEN if chosen == "sdpa" else chosen)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: addresses are reused
        return tensor

    row = torch.arange(tokens)
    positions = row % (tokens // 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(
            input_ids=row[None] % 200,
            position_ids=positions[None],
            use_cache=False,
            **sequences_of(model, positions),
        )

    return sum(size for address, (size, _) in saved.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (LlamaConfig(**TINY), 0.02),
        (Qwen2Config(**TINY), 0.02),
        (Qwen3Config(**TINY), 0.02),
        (MistralConfig(**TINY), 0.02),
        (MistralConfig(**TINY, sliding_window=8), 0.02),
        (Gemma2Config(**TINY), 0.03),
        (Gemma3TextConfig(**TINY), 0.05),
        (GPTNeoXConfig(**TINY), 0.2),  # queries, keys and values are one product, kept as a whole
        (MixtralConfig(**TINY, num_local_experts=4, **EXPERTS), 0.05),
        (Qwen3MoeConfig(**TINY, num_experts=8, moe_intermediate_size=96, **EXPERTS), 0.05),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_activations_of_a_layer_are_what_autograd_saves(shapes, config, tolerance, dtype):
    """One layer is the difference of a model of three and one of two."""
    more = type(config)(**(config.to_dict() | {"num_hidden_layers": 3, "layer_types": None}))
    saved = saved_bytes(more, dtype, 64) - saved_bytes(config, dtype, 64)

    training = training_of(width=4 if dtype == torch.float32 else 2, token_budget=64)
    planned = activations(shapes(more), *training) - activations(shapes(config), *training)
    assert planned == pytest.approx(saved, rel=tolerance)


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), Qwen3Config(**TINY)])
def test_activations_under_a_mask_are_what_autograd_saves(shapes, config):
    """In float32 on a GPU, imitated by the attention that it has there."""
    more = type(config)(**(config.to_dict() | {"num_hidden_layers": 3, "layer_types": None}))
    saved = saved_bytes(more, torch.float32, 64, "sdpa")
    saved -= saved_bytes(config, torch.float32, 64, "sdpa")

    training = training_of(width=4, token_budget=64, gpus=1)
    planned = activations(shapes(more), *training) - activations(shapes(config), *training)
    assert planned == pytest.approx(saved, rel=0.02)


def training_of(width=2, **changes):
    """The learner's section, and the bytes of the student's type."""
    values = {"zero_stage": 1, "token_budget": 1000, "logit_chunk_tokens": 256}
    return LearnerConfig(**(values | changes)), width


# A layer in bfloat16 on a GPU: norms 2 x 8 x 8 = 128; heads 2 x 4 x (2 x 2 + 2 x 1) = 48, their
# logsumexp 8; MLP 2 x 64 = 128; together 312 bytes a token.
SMALL = Architecture(
    name="Small",
    parameters=1000,
    trained=1000,
    largest_tensor=100,
    layers=10,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    mlp_kept=64,
    norms=2,
    norm_kind="rms",
    has_head_norms=False,
    vocabulary=100,
    windowed_layers=0,
    window=0,
    eager_attention=False,
    has_softcap=False,
    quantised=None,
)
ENDS, UNDER_WAY = 1000 * (64 + 32), 1000 * 96  # last norm, hidden states, their gradient; the MLP


def test_activations_by_hand():
    on_gpu = training_of(gpus=1)
    assert activations(SMALL, *on_gpu) == 10 * 1000 * 312 + ENDS + UNDER_WAY
    recomputed = training_of(gpus=1, activation_checkpointing=True)
    assert activations(SMALL, *recomputed) == 10 * 1000 * 16 + 1000 * 312 + ENDS + UNDER_WAY


def test_a_cpu_keeps_the_output_of_attention_twice():
    """By sequences and joined: 2 x 2 x 4 = 16 bytes more."""
    on_cpu = training_of(gpus=0)
    assert activations(SMALL, *on_cpu) == 10 * 1000 * 328 + ENDS + UNDER_WAY


def test_a_mask_grows_with_the_square_of_the_micro_batch():
    """In float32 on a GPU: keys and values are spread to all heads, 192 + 4 x 4 x 8 + 8 + 256 = 584
    bytes a token; a mask in each layer, and one more.
    """
    masked = activations(SMALL, *training_of(gpus=1, width=4))
    ends = 1000 * (96 + 64) + 1000 * 192
    assert masked == 10 * (1000 * 584 + 4 * 10**6) + 10**6 + ends

    windowed = replace(SMALL, windowed_layers=3, window=100)
    on_cpu = training_of(gpus=0)
    assert activations(windowed, *on_cpu) == activations(SMALL, *on_cpu) + 2 * 10**6

    eager = replace(SMALL, eager_attention=True)
    of_pairs = 8 * 2 * 10**6
    assert activations(eager, *training_of()) == (
        10 * (1000 * 328 + of_pairs) + 10**6 + ENDS + UNDER_WAY
    )


# --- states

# bytes of a trained parameter on one of two ranks: weights, gradients, masters, moments
STATES = {
    (0, 4): (4, 4, 0, 8),
    (0, 2): (2, 2, 4, 8),
    (1, 4): (4, 4, 2, 4),
    (1, 2): (2, 6, 2, 4),
    (2, 4): (4, 4, 2, 4),
    (2, 2): (2, 3, 2, 4),
    (3, 4): (2, 2, 2, 4),
    (3, 2): (1, 2, 2, 4),
}


@pytest.mark.parametrize("stage, width", STATES)
def test_states_of_a_rank_by_zero_stage_and_type(stage, width):
    states = learner_states(SMALL, *training_of(zero_stage=stage, width=width, ranks=2))
    names = ("weights", "gradients", "float32 masters", "two moments")
    assert tuple(states.device.get(name, 0) / 1000 for name in names) == STATES[stage, width]
    assert states.host == {}


OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def test_an_offloaded_optimiser_lies_in_host_memory():
    training = training_of(zero_stage=2, ranks=2, gpus=1, deepspeed=OFFLOADED)
    states = learner_states(SMALL, *training)
    assert states.host == {
        "float32 masters": 2000,
        "two moments": 4000,
        "gradients of the share": 3000,
    }
    assert states.device == {"weights": 2000, "gradients": 3000, "reduction bucket": 10**9}


def test_frozen_weights_have_neither_gradients_nor_moments():
    """900 frozen parameters and 100 of adapters, in bfloat16 under ZeRO-1 on one rank."""
    adapted = replace(SMALL, parameters=900, trained=100)
    assert learner_states(adapted, *training_of()).device == {
        "weights": 2000,
        "gradients": 600,
        "float32 masters": 400,
        "two moments": 800,
    }


def test_the_loss_holds_one_chunk_and_the_gradient_of_the_head():
    """In bfloat16 logits and operand take 6 bytes, the head's gradient and its copy too."""
    assert loss_buffers(SMALL, *training_of()) == 6 * 256 * 100 + 6 * 100 * 8
    assert loss_buffers(SMALL, *training_of(width=4)) == 4 * 256 * 100 + 4 * 100 * 8
    assert loss_buffers(SMALL, *training_of(token_budget=10)) == 6 * 10 * 100 + 6 * 100 * 8
    capped = replace(SMALL, has_softcap=True)
    assert loss_buffers(capped, *training_of(width=4)) == 8 * 256 * 100 + 4 * 100 * 8
    adapted = replace(SMALL, trained=10)
    assert loss_buffers(adapted, *training_of()) == 6 * 256 * 100


def test_an_update_needs_more_than_a_short_micro_batch():
    large = replace(SMALL, parameters=10**8, trained=10**8)
    assert passes(large, *training_of(zero_stage=0, width=4)) == {"buffers of an update": 4 * 10**8}
    assert set(passes(SMALL, *training_of(zero_stage=0, width=4))) == {"activations", "loss"}


# --- keys and values


def test_keys_and_values_of_qwen3_0_6b(shapes):
    """Two of 28 layers x 8 heads x 128 x 2 bytes: 114,688 bytes a token, as is widely quoted."""
    model = shapes(qwen3())
    assert kv_bytes(model, tokens=1000, width=2, workers=1) == 114_688_000
    assert kv_bytes(model, tokens=1000, width=2, workers=4) == 28_672_000
    assert kv_bytes(model, tokens=1000, width=2, workers=16) == 14_336_000  # a head is not cut
    assert kv_bytes(model, tokens=1000, width=1, workers=1, stages=2) == 28_672_000


def test_windowed_layers_keep_a_window(shapes):
    """Of two layers of Gemma 2 the first attends to the last 50 tokens."""
    model = shapes(Gemma2Config(**TINY, sliding_window=50))
    assert kv_bytes(model, tokens=200, width=2, workers=1) == 2 * 2 * 2 * 24 * (200 + 50)
    assert kv_bytes(model, tokens=20, width=2, workers=1) == 2 * 2 * 2 * 24 * (20 + 20)


# --- a config


@pytest.fixture
def config(tmp_path):
    """A function that loads a config with changes: prompts of 100 and responses of 900 tokens."""

    def load(*overrides):
        path = fakes.write_config(tmp_path, batches=9)
        return load_config(
            path,
            [
                "student.dtype=bfloat16",
                "teachers.0.dtype=bfloat16",
                "prompts.max_tokens=100",
                "rollout.max_response_tokens=900",
                "evaluation.max_response_tokens=900",
                "learner.token_budget=4096",
                "flow.batch_prompts=8",
                *overrides,
            ],
        )

    return load


ON_GPUS = ("learner.gpus=1", "rollout.gpus=1", "teachers.0.gpus=1")
HARDWARE = Hardware(gpu_bytes=80 * GB)


def test_a_learner_rank_is_the_sum_of_its_parts(config, shapes):
    need = learner_need(config(*ON_GPUS), shapes(qwen3()), HARDWARE)
    p = 596_049_920
    assert need.device["weights"] == 2 * p and need.device["two moments"] == 8 * p
    assert need.device_bytes == sum(need.device.values()) and need.limit == 72 * GB
    assert need.device["a bucket of weights"] == 2 * 151_936 * 1024  # NCCL's: the embedding
    assert need.host == {"packed weights": 2 * 2 * 151_936 * 1024}  # two buckets of that size


@pytest.mark.parametrize("settings", [(), ("learner.gpus=1",)])
def test_the_first_of_several_ranks_alone_packs_the_weights(config, shapes, settings):
    alone = learner_need(config(*settings), shapes(qwen3()), HARDWARE)
    ranks = learner_need(config(*settings, "learner.ranks=8"), shapes(qwen3()), HARDWARE)
    each = 0 if settings else ranks.device_bytes - 2 * 596_049_920
    assert alone.of_first == 2 * 596_049_920
    assert ranks.memory_bytes == 2 * 596_049_920 + 8 * each


def test_weights_are_packed_whole_where_a_host_shares_them(config, shapes):
    model = shapes(qwen3())
    need = learner_need(config("learner.gpus=0.5"), model, HARDWARE)
    assert need.host["packed weights"] == 2 * 596_049_920
    apart = learner_need(config("learner.gpus=0.5"), model, replace(HARDWARE, nodes=2))
    assert apart.host["packed weights"] == 2 * 2 * 151_936 * 1024


def test_a_role_without_a_gpu_needs_the_memory_of_its_machine(config, shapes):
    need = learner_need(config(), shapes(qwen3()), HARDWARE)
    assert need.host == {} and need.limit is None and need.fits is None
    assert need.device["packed weights"] == 2 * 596_049_920


def test_the_cache_of_an_engine_takes_what_is_left_of_its_gpu(config, shapes):
    model = shapes(QWEN3_8B)
    need = rollout_need(config(*ON_GPUS), model, HARDWARE)
    assert need.device["weights"] == 2 * 8_190_735_360
    assert need.device_bytes == need.limit == int(0.92 * 80 * GB) and need.fits
    of_one = 2 * 2 * 36 * 8 * 128 * 1000  # prompt and response together
    assert need.responses == need.device["KV cache"] // of_one > 100
    halved = rollout_need(
        config(
            "learner.gpus=1",
            "rollout.gpus=2",
            "rollout.vllm={tensor_parallel_size: 2, gpu_memory_utilization: 0.5}",
        ),
        model,
        HARDWARE,
    )
    assert halved.device["weights"] == 8_190_735_360 and halved.limit == 40 * GB
    assert halved.host["received weights"] == 2 * 8_190_735_360  # once, for both GPUs


def test_a_cache_of_a_named_size_holds_so_many_responses(config, shapes):
    named = config("rollout.vllm={kv_cache_memory_bytes: 1000000000}")
    need = rollout_need(named, shapes(qwen3()), HARDWARE)
    assert need.device["KV cache"] == GB
    assert need.responses == 8  # of 114,688,000 bytes each


def test_an_engine_whose_weights_leave_no_room_does_not_fit(config, shapes):
    need = rollout_need(config(*ON_GPUS), shapes(QWEN3_8B), Hardware(gpu_bytes=16 * GB))
    assert need.fits is False
    assert need.device["KV cache"] == 2 * 2 * 36 * 8 * 128 * 1000  # one response at least


def test_a_teacher_on_cpus_has_a_float32_copy_of_its_head(config, shapes):
    model = shapes(qwen3())
    head = teacher_need(config(), 0, model, HARDWARE).device["float32 head"]
    assert head == 4 * 151_936 * 1024
    plain = config("teachers.0.head_dtype=model")
    assert "float32 head" not in teacher_need(plain, 0, model, HARDWARE).device
    on_gpu = config("teachers.0.gpus=1")
    assert "float32 head" not in teacher_need(on_gpu, 0, model, HARDWARE).device


def test_the_bytes_of_a_trajectory_are_those_of_its_arrays(config, shapes):
    floats = np.zeros(900, np.float32)
    trajectory = fakes.trajectory(range(900), of=fakes.prompt(token_ids=range(100)))
    signal = TeacherSignal(
        teacher="t",
        token_logprobs=floats,
        entropy=Exact(floats),
        topk_ids=np.zeros((900, 16), np.int32),
        topk_logprobs=np.zeros((900, 16), np.float32),
        tail_logprobs=floats,
    )
    held = array_bytes(ScoredTrajectory(trajectory=trajectory, signal=signal))
    traffic = traffic_of(config("loss.top_k=16"), shapes(qwen3()), HARDWARE)
    assert traffic.body_bytes == held == 400 + 900 * 153
    assert traffic.slots == 8 and traffic.in_flight_bytes == 8 * held


def array_bytes(value):
    """The bytes of all arrays below a dataclass."""
    if isinstance(value, np.ndarray):
        return value.nbytes

    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return sum(array_bytes(getattr(value, field.name)) for field in fields)


def test_a_publish_takes_as_long_as_the_senders_link(config, shapes):
    """1.192 GB at 10 Gbit/s are 0.954 s; three members of gloo are two rounds."""
    model = shapes(qwen3())
    apart = Hardware(gpu_bytes=80 * GB, nodes=2, bandwidth=read_bandwidth("-", "10Gbit"))
    two = traffic_of(config("rollout.engines=2"), model, apart)
    assert two.wire == "gloo" and two.sync_s == pytest.approx(2 * 0.953680, rel=1e-5)
    on_gpus = traffic_of(config("rollout.engines=2", *ON_GPUS), model, apart)
    assert on_gpus.wire == "nccl" and on_gpus.sync_s == pytest.approx(0.953680, rel=1e-5)
    assert traffic_of(config(), model, replace(apart, nodes=1)).sync_s is None


def test_what_checkpoints_take_on_disk(config, shapes):
    """596,049,920 parameters: float32 masters and two moments, and under LoRA two bytes of weights."""
    model = shapes(qwen3())
    two = ("checkpoint={keep_last: 3, every: 10}", "run.batches=20")
    traffic = traffic_of(config(*two), model, HARDWARE)
    assert (traffic.checkpoint_bytes, traffic.checkpoints) == (7_152_599_040, 2)
    best = "checkpoint={keep_last: 3, every: 10, keep_best: {metric: held_out/reverse_kl, mode: min, n: 2}}"
    held_out = traffic_of(config(best, "run.batches=100", "evaluation.every=10"), model, HARDWARE)
    assert held_out.checkpoints == 6
    adapters = ("student.lora={rank: 16}", "student.dtype=bfloat16", "run.batches=100")
    traffic = traffic_of(config(*two, *adapters), model, HARDWARE)
    assert (traffic.checkpoint_bytes, traffic.checkpoints) == (1_192_099_840, 4)


def test_a_publish_of_adapters_takes_them_alone(config, shapes):
    """Rank 16 of seven matrices in each of 28 layers."""
    lora = LoraConfig(rank=16)
    model = shapes(qwen3(), lora)
    per_layer = sum(
        16 * (inner + outer)
        for inner, outer in (
            (1024, 2048),
            (1024, 1024),
            (1024, 1024),
            (2048, 1024),
            (1024, 3072),
            (1024, 3072),
            (3072, 1024),
        )
    )
    alone = config("student.lora={rank: 16}", "student.dtype=bfloat16")
    assert traffic_of(alone, model, Hardware(gpu_bytes=80 * GB)).sync_bytes == 2 * 28 * per_layer
    whole = config(
        "student.lora={rank: 16}", "student.dtype=bfloat16", "rollout.vllm={load_format: dummy}"
    )
    assert traffic_of(whole, model, Hardware(gpu_bytes=80 * GB)).sync_bytes == 2 * 596_049_920

    for sent, copies in ((alone, False), (whole, True)):  # merging makes copies
        need = learner_need(sent, model, Hardware(gpu_bytes=80 * GB))
        assert ("a bucket of weights" in need.device | need.host) == copies


# --- what to change


def advised(config, student, teacher, gpu_bytes):
    models = Models(student=student, teachers={config.teachers[0].name: teacher})
    return plan_run(config, models, Hardware(gpu_bytes=gpu_bytes))


def test_nothing_is_advised_where_all_fits(config, shapes):
    small = shapes(qwen3())
    plan = advised(config(*ON_GPUS), small, small, 80 * GB)
    assert plan.fits and plan.advice == []


def test_advice_names_keys_and_values_that_fit(config, shapes):
    """Each sentence is taken at its word: the config that it describes is planned again."""
    small = shapes(qwen3())
    tight = config(*ON_GPUS, "learner.token_budget=65536")
    plan = advised(tight, small, small, 40 * GB)
    assert plan.fits is False
    budget = next(text for text in plan.advice if "token_budget" in text)
    tokens = int(budget.partition("token_budget: ")[2].partition(":")[0])
    assert tokens % 256 == 0 and 1000 <= tokens < 65_536

    def fits(**values):
        changed = tight.model_copy(update={"learner": tight.learner.model_copy(update=values)})
        return learner_need(changed, small, plan.hardware).fits

    assert fits(token_budget=tokens) and not fits(token_budget=tokens + 256)
    said = any("learner.activation_checkpointing: true" in text for text in plan.advice)
    assert said == fits(activation_checkpointing=True)


def test_several_changes_are_one_sentence_where_no_single_one_fits(config, shapes):
    large = shapes(QWEN3_8B)
    tight = config(*ON_GPUS, "learner.token_budget=65536")
    learner = advised(tight, large, shapes(qwen3()), 80 * GB).advice[0]
    assert learner.startswith("A learner rank fits with learner.")
    assert "learner.activation_checkpointing: true with learner.token_budget: 1000 with" in learner
    impossible = advised(tight, large, shapes(qwen3()), GB).advice[0]
    assert "does not fit on up to 64 ranks" in impossible


def test_a_change_that_the_config_refuses_is_not_advised(config, shapes):
    """A batch of one trajectory trains on one rank alone."""
    large, small = shapes(QWEN3_8B), shapes(qwen3())
    for prompts, told in ((8, True), (1, False)):
        alone = config(*ON_GPUS, f"flow.batch_prompts={prompts}")
        found = advised(alone, large, small, 80 * GB).advice
        assert found and any("learner.ranks" in text for text in found) == told


def test_an_engine_is_advised_more_gpus_or_less_of_a_shared_one(config, shapes):
    small, large = shapes(qwen3()), shapes(QWEN3_8B)
    plan = advised(config(*ON_GPUS), small, large, 16 * GB)
    teacher = [text for text in plan.advice if text.startswith("A teacher")]
    assert len(teacher) == 1
    assert "teachers.0.vllm.tensor_parallel_size: 2 with teachers.0.gpus: 2" in teacher[0]
    shared = advised(
        config("rollout={gpus: 0.5, vllm: {gpu_memory_utilization: 0.9}}"), small, small, 80 * GB
    ).advice
    assert len(shared) == 1 and "rollout.vllm.gpu_memory_utilization: 0.45" in shared[0]


# --- balance

STAGES = (
    Stage(name="generate", rate=100.0, devices=1),
    Stage(name="score", rate=400.0, devices=2),
    Stage(name="train", rate=200.0, devices=1),
)


def test_devices_are_balanced_by_rates():
    """400 tokens/s need 4 engines, 1 replica of two devices and 2 ranks: all of 8 devices."""
    assert best_counts(STAGES, 8) == {"generate": 4, "score": 1, "train": 2}
    found = balance(STAGES, best_counts(STAGES, 8), devices=8, batch_tokens=1000.0)
    assert found.tokens_per_s == 400.0 and found.steps_per_hour == 1440.0 and found.spare == 0


def test_the_best_balance_is_that_of_all_combinations():
    for devices in range(4, 40):
        every = [
            min(100.0 * e, 400.0 * s, 200.0 * t)
            for e in range(1, devices)
            for s in range(1, devices)
            for t in range(1, devices)
            if e + 2 * s + t <= devices
        ]
        counts = best_counts(STAGES, devices)
        found = balance(STAGES, counts, devices=devices, batch_tokens=1.0)
        assert found.tokens_per_s == max(every) and found.spare >= 0


def test_the_bottleneck_is_named_and_where_it_moves():
    found = balance(STAGES, {"generate": 1, "score": 1, "train": 1}, devices=4, batch_tokens=1000.0)
    assert (found.bottleneck, found.next_bottleneck) == ("generate", "generate")
    assert (found.tokens_per_s, found.next_tokens_per_s) == (100.0, 200.0)
    assert found.in_turn_steps == pytest.approx(3600 / (10 + 2.5 + 5))
    three = balance(STAGES, {"generate": 3, "score": 1, "train": 1}, devices=6, batch_tokens=1.0)
    assert (three.bottleneck, three.next_bottleneck) == ("train", "generate")


def test_too_few_devices_are_a_mistake():
    with pytest.raises(ConfigError, match=r"--devices 3: .* 4 devices \(generate 1, score 2, tr"):
        best_counts(STAGES, 3)


def test_a_teacher_behind_a_server_uses_no_device(config):
    rates = {"generate": 1.0, "score": 2.0, "train": 3.0}
    assert [stage.name for stage in stages_of(config(), rates)] == ["generate", "score", "train"]
    served = config("teachers.0.backend=eopd", "teachers.0.server={url: 'http://host:8000'}")
    assert [stage.name for stage in stages_of(served, rates)] == ["generate", "train"]


# --- units


def test_sizes_and_rates_are_read():
    assert read_bytes("-", "80GB") == 80 * GB and read_bytes("-", "40 GiB") == 40 * 2**30
    assert read_bandwidth("-", "100Gbit") == 12.5e9 and read_bandwidth("-", "2.5GB") == 2.5e9
    assert read_rates("-", "train=3, generate=1,score=2.5") == {
        "generate": 1.0,
        "score": 2.5,
        "train": 3.0,
    }


# --- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "80"], "--gpu-memory 80: must be a number and one of MB, GB"),
        (["--gpu-memory", "80gigs"], "--gpu-memory 80gigs: must be a number"),
        (["--gpu-memory", "0GB"], "--gpu-memory 0GB: must be above 0"),
        (["--bandwidth", "100Gbps"], "--bandwidth 100Gbps: must be a number"),
        (["--rates", "generate=1,score=2"], "--rates: lacks train; `eopd profile CONFIG`"),
        (["--rates", "generate=1,score=2,train=0"], "--rates: train must be response tokens"),
        (["--rates", "generate=1,generate=2,train=3"], "--rates: generate stands twice"),
        (["--rates", "write=1"], "--rates: 'write' is none of generate, score, train"),
        (["--devices", "8"], "--devices: goes with --rates"),
        (["--set", "student.model=org/absent"], "org/absent: the cache of this machine has no"),
        (["--set", "student.model=/absent"], "/absent: there is no such model directory"),
    ],
)
def test_a_mistake_is_one_message(options, message, checked_model, tmp_path, eopd):
    done = eopd("plan", fakes.write_whole_config(tmp_path, checked_model), *options)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1


def test_the_command_prints_what_its_json_holds(checked_model, tmp_path, eopd):
    path = fakes.write_whole_config(tmp_path, checked_model)
    rates = ["--rates", "generate=10,score=20,train=30", "--response-tokens", "5"]
    printed, record = eopd("plan", path, *rates), eopd("plan", path, *rates, "--json")
    assert printed.code == record.code == 0
    found = json.loads(record.out)
    assert f"student {found['parameters']['student']:,}" in printed.out
    assert [role["role"] for role in found["roles"]] == [
        "learner rank",
        "rollout engine",
        "teacher teacher",
    ]
    assert found["fits"] is None and found["lack_of_gpus"] is None
    assert found["balance"]["bottleneck"] == "generate"
    assert "The bottleneck is generate" in printed.out


def test_gpus_that_a_cluster_lacks_are_told(checked_model, tmp_path, eopd):
    gpus = [part for setting in ON_GPUS for part in ("--set", setting)]
    path = fakes.write_whole_config(tmp_path, checked_model)
    lack = eopd("plan", path, *gpus, "--gpus-per-node", "2")
    assert lack.code == 0 and "the roles ask for 3 gpus" in lack.out
    enough = eopd("plan", path, *gpus, "--gpus-per-node", "2", "--nodes", "2")
    assert "There is no room" not in enough.out


def test_a_name_is_read_from_the_cache_alone(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    with pytest.raises(ConfigError, match=r"^org/name: the cache .* `hf download org/name config"):
        require_cached_directory("org/name")

    (snapshot / "config.json").write_text("{}")
    assert require_cached_directory("org/name") == snapshot
    with pytest.raises(ConfigError, match=r"config.json --revision v2`"):
        require_cached_directory("org/name@v2")
