"""The scoring twin of every family is the family's own model: heads, scales, soft-caps and biases,
exactly.

Engines run inside the test's process, so that one costs a second or two and the rows of its head
can be counted.
"""

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_oracle import MAX_TOKENS, bfloat16_engines, deviations, mixed_batch, oracle
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from vllm import LLM, PoolingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from eopd.async_llm import models_inspected_here
from eopd.config import ConfigError, TeacherConfig
from eopd.teacher import head
from eopd.teacher.signal import read_signal
from eopd.teacher.vllm_scorer import engine_options
from eopd.types import Stored, TeacherSignal, Trajectory

VOCAB = 1001  # no multiple of vLLM's padding, so that padded rows would show
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
GEMMA = SIZES | {"query_pre_attn_scalar": 32, "sliding_window": 32}
SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4}
CUT = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32}


@dataclass(frozen=True)
class Case:
    config: PretrainedConfig
    top_k: int = 16
    temperature: float = 1.0
    vllm: dict[str, object] = field(default_factory=dict)


CASES = {
    "llama": Case(
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        top_k=256,
        temperature=0.7,
        vllm=CUT,
    ),
    "llama tied": Case(
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        top_k=VOCAB,
        temperature=1.5,
        vllm=CUT,
    ),
    "qwen2": Case(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen2 tied": Case(Qwen2Config(**SIZES, tie_word_embeddings=True), vllm=CUT),
    "qwen3": Case(Qwen3Config(**SIZES, tie_word_embeddings=False), top_k=VOCAB - 1),
    "gemma2, soft-capped": Case(
        Gemma2Config(**GEMMA, final_logit_softcapping=5.0),
        temperature=0.7,
        vllm=CUT,
    ),
    "gemma3": Case(Gemma3TextConfig(**GEMMA, final_logit_softcapping=5.0)),
    "gpt2": Case(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=512,
            initializer_range=0.2,
        )
    ),
    "gptj, biased head": Case(
        GPTJConfig(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=2,
            rotary_dim=16,
            n_positions=512,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    ),
    "starcoder2, by way of transformers": Case(Starcoder2Config(**SIZES, sliding_window=None)),
    "cohere, scaled": Case(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite, scaled": Case(
        GraniteConfig(
            **SIZES,
            logits_scaling=3.0,
            tie_word_embeddings=False,
        )
    ),
}


def write(case: Case, directory: Path) -> Path:
    """Random weights; biases too, which a fresh model has at zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(case.config)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.5)

    model.save_pretrained(directory)

    return directory


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # eight times an engine vLLM would look at all that this process has imported
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    monkeypatch.setattr(
        torch,
        "set_num_threads",
        torch.set_num_threads,
    )  # the engine replaces it


@contextmanager
def engine(config: TeacherConfig, top_k: int) -> Iterator[LLM]:
    with models_inspected_here():
        llm = LLM(**engine_options(config, top_k=top_k, max_sequence_tokens=MAX_TOKENS))

    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def score(llm: LLM, batch: Sequence[Stored[Trajectory]], top_k: int) -> list[TeacherSignal]:
    bodies = [stored.body for stored in batch]
    prompts = [
        TokensPrompt(prompt_token_ids=[*b.prompt.token_ids.tolist(), *b.response_ids.tolist()])
        for b in bodies
    ]
    params = [
        PoolingParams(task=head.TASK, extra_kwargs={head.RESPONSE_TOKENS: len(b.response_ids)})
        for b in bodies
    ]
    outputs = llm.encode(prompts, params, pooling_task=head.TASK, use_tqdm=False)

    return [
        read_signal(
            out.outputs.data.numpy(),
            teacher="t",
            num_response_tokens=len(b.response_ids),
            top_k=top_k,
        )
        for out, b in zip(outputs, bodies, strict=True)
    ]


def watch_head(llm: LLM) -> list[torch.Tensor]:
    """Hidden states of every projection to the vocabulary from now on, as the engine's own
    logits layer sees them.
    """
    seen: list[torch.Tensor] = []

    def watch(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(
                    lambda _module, args, _out: seen.append(args[1].clone())
                )

    llm.apply_model(watch)

    return seen


def load(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The weights an engine of this precision holds, in float64; other attentions than eager
    drop Gemma's soft-cap.
    """
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).double()


def worst_errors(
    signals: Sequence[TeacherSignal],
    batch: Sequence[Stored[Trajectory]],
    logprobs: Sequence[np.ndarray],
) -> dict[str, float]:
    found = [
        deviations(signal, stored.body.response_ids, expected)
        for signal, stored, expected in zip(signals, batch, logprobs, strict=True)
    ]
    worst = dict(found[0])
    for errors in found:
        for name, error in errors.items():
            worst[name] = max(worst[name], error)

    return worst


# Tied or not, chunked, soft-capped, scaled, biased: one family each; the others are slow.
QUICK = ("llama tied", "qwen3", "gemma2, soft-capped", "gptj, biased head", "cohere, scaled")


def families(names: Iterable[str], quick: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names],
    )


@families(CASES, QUICK)
def test_a_float32_twin_equals_its_family(tmp_path, name):
    case = CASES[name]
    config = TeacherConfig(
        model=write(case, tmp_path),
        dtype="float32",
        temperature=case.temperature,
        vllm=SMALL | case.vllm,
    )
    batch = mixed_batch(VOCAB)
    # first: an engine may rewrite classes of transformers in place
    model = load(config.model, torch.float32)
    expected = [oracle(model, stored.body, case.temperature) for stored in batch]
    with engine(config, case.top_k) as llm:
        seen = watch_head(llm)
        signals = score(llm, batch, case.top_k)

    found = worst_errors(signals, batch, expected)
    assert max(found.values()) < 5e-5, found
    assert sum(len(rows) for rows in seen) == sum(len(stored.body.response_ids) for stored in batch)


def head_logprobs(
    model: torch.nn.Module, hidden: torch.Tensor, body: Trajectory, temperature: float
) -> np.ndarray:
    """What transformers' own head says in float64 of the hidden states that reached the
    engine's.
    """
    assert len(body.prompt.token_ids) == 1  # every row but the last predicts a response token
    rows = torch.nn.functional.pad(hidden.double(), (0, 0, 0, 1))
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows[None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.base_model, "forward", lambda *_args, **_kwargs: output)
        return oracle(model, body, temperature)


def one_token_prompt() -> Stored[Trajectory]:
    return next(stored for stored in mixed_batch(VOCAB) if len(stored.body.response_ids) == 90)


@bfloat16_engines
@families(
    ["llama tied", "gemma2, soft-capped", "gpt2", "gptj, biased head", "cohere, scaled"],
    ["gptj, biased head"],
)
def test_a_bfloat16_twin_projects_its_hidden_states_in_float32(tmp_path, name):
    case, stored = CASES[name], one_token_prompt()
    config = TeacherConfig(
        model=write(case, tmp_path),
        dtype="bfloat16",
        temperature=case.temperature,
        vllm=SMALL | case.vllm,
    )
    with engine(config, case.top_k) as llm:
        seen = watch_head(llm)
        signals = score(llm, [stored], case.top_k)

    hidden = torch.cat(seen)
    assert hidden.dtype == torch.bfloat16
    model = load(config.model, torch.bfloat16)
    found = worst_errors(
        signals,
        [stored],
        [head_logprobs(model, hidden, stored.body, case.temperature)],
    )
    assert max(found.values()) < 5e-5, found


def quantize(directory: Path, group: int = 32) -> dict[str, torch.Tensor]:
    """Rewrite a Llama as a symmetric four-bit GPTQ checkpoint; the weights it then stands
    for, by name.
    """
    path, restored = directory / "model.safetensors", {}
    weights = load_file(path)

    for name in [name for name in weights if name.endswith("proj.weight")]:
        weight = weights.pop(name).t()  # [in, out]
        groups = weight.unflatten(0, (-1, group))
        scales = (groups.abs().amax(1) / 7).bfloat16()
        steps = (groups / scales[:, None].float()).round().clamp(-8, 7)
        restored[name] = (steps * scales[:, None].float()).flatten(0, 1).t()
        nibbles = (steps.flatten(0, 1).long() + 8).unflatten(0, (-1, 8))
        stem = name.removesuffix("weight")
        weights[stem + "qweight"] = (
            (nibbles << torch.arange(0, 32, 4)[:, None]).sum(1).to(torch.int32)
        )
        weights[stem + "qzeros"] = torch.full(
            (len(scales), weight.shape[1] // 8),
            0x77777777,
            dtype=torch.int32,
        )
        weights[stem + "scales"] = scales
        weights[stem + "g_idx"] = torch.arange(len(weight), dtype=torch.int32) // group

    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    method = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
    }
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": method}))

    return restored


@bfloat16_engines
@pytest.mark.skipif(
    not hasattr(torch.ops._C, "cpu_gemm_wna16"),
    reason="vLLM's build for AVX2 runs no four-bit weights, and is refused",
)
def test_a_quantized_teacher_has_an_exact_head(tmp_path):
    case, stored = CASES["llama"], one_token_prompt()
    config = TeacherConfig(model=write(case, tmp_path), dtype="bfloat16", vllm=SMALL)
    original = load(config.model, torch.bfloat16)
    restored = load(config.model, torch.bfloat16)
    missing, unexpected = restored.load_state_dict(quantize(Path(config.model)), strict=False)
    assert missing and not unexpected
    with engine(config, 16) as llm:
        seen = watch_head(llm)
        signals = score(llm, [stored], 16)

    exact, near, far = (
        worst_errors(signals, [stored], [logprobs])
        for logprobs in (
            head_logprobs(original, torch.cat(seen), stored.body, 1.0),
            oracle(restored, stored.body, 1.0),
            oracle(original, stored.body, 1.0),
        )
    )
    assert max(exact.values()) < 5e-5, exact
    assert max(near.values()) < 0.5 < far["token"], (near, far)


def test_a_quantized_teacher_without_a_kernel_is_refused(tmp_path, monkeypatch):
    config = TeacherConfig(model=write(CASES["llama"], tmp_path), vllm=SMALL)
    monkeypatch.setattr(
        torch.ops,
        "_C",
        SimpleNamespace(),
    )  # as on a machine without AVX-512
    assert engine_options(
        config,
        top_k=16,
        max_sequence_tokens=MAX_TOKENS,
    )["model"] == str(tmp_path)
    quantize(Path(config.model))

    with pytest.raises(
        ConfigError, match=r"is quantised \(gptq\), and vLLM's CPU build .* cannot run such weights"
    ):
        engine_options(config, top_k=16, max_sequence_tokens=MAX_TOKENS)


def test_a_prefill_preempted_in_the_middle_gives_the_same_signal(tmp_path, monkeypatch):
    """Four requests grow by 16 tokens a step in a cache for one and a half: their first rows
    arrive twice.
    """
    computed: list[int] = []
    preempt = Scheduler._preempt_request

    def watched(self: Scheduler, request: Request, *args: object, **kwargs: object) -> None:
        computed.append(request.num_computed_tokens)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    tight = {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
        "long_prefill_token_threshold": 16,
        "scheduler_reserve_full_isl": False,
        "block_size": 32,
        "num_gpu_blocks_override": 8,
    }
    case = CASES["qwen3"]
    config = TeacherConfig(
        model=write(case, tmp_path),
        dtype="float32",
        vllm=SMALL | tight,
    )
    batch = mixed_batch(VOCAB)
    with engine(config, 16) as llm:
        signals = score(llm, batch, 16)

    assert max(computed) > 0
    model = load(config.model, torch.float32)
    found = worst_errors(
        signals,
        batch,
        [oracle(model, stored.body, 1.0) for stored in batch],
    )
    assert max(found.values()) < 5e-5, found
