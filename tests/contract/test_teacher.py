"""The teacher on real vLLM, against a float64 full-vocabulary oracle made with transformers."""

import asyncio
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from teacher_oracle import MAX_TOKENS, bfloat16_engines, deviations, mixed_batch, oracle, trajectory
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from eopd.config import ConfigError, TeacherConfig
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.teacher import head
from eopd.teacher.head import score_logits
from eopd.teacher.selftest import TeacherSelfTestError, self_test
from eopd.teacher.signal import num_columns, read_signal
from eopd.teacher.vllm_scorer import VllmTeacherScorer, engine_options
from eopd.tokenizer import vocab_size
from eopd.types import LostReason, LostTrajectory, StopReason, Stored, TeacherSignal

OWN_END, THEIR_END, PADDING_ROWS = 0, 2, 7
SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4}

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def worst_deviations(
    scorer: VllmTeacherScorer, directory: Path, dtype: torch.dtype, temperature: float
) -> tuple[dict[str, float], list[TeacherSignal]]:
    """Score the mixed batch concurrently; the largest error of every part over all trajectories."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).double()
    batch = mixed_batch(model.config.vocab_size)
    scored = await asyncio.gather(*(scorer.score(stored) for stored in batch))
    worst: dict[str, float] = {}
    signals = []

    for stored, result in zip(batch, scored, strict=True):
        assert isinstance(result, Stored)
        signal = result.body.signal
        errors = deviations(
            signal,
            stored.body.response_ids,
            oracle(model, stored.body, temperature),
        )
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
        signals.append(signal)

    return worst, signals


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chunked(tiny_model):
    """Tied head, few candidates, temperature 0.7, prefills cut into pieces of at most 48 tokens."""
    config = TeacherConfig(
        model=tiny_model("qwen3", seed=3, scale=0.2),
        dtype="float32",
        temperature=0.7,
        vllm={**SMALL, "enable_chunked_prefill": True, "max_num_batched_tokens": 48},
    )
    scorer = await VllmTeacherScorer.start(
        config,
        top_k=8,
        max_sequence_tokens=MAX_TOKENS,
    )
    yield scorer, config
    await scorer.close()


ROW_OFF = """
from eopd.teacher import head

right = head._response_rows


class Worker:
    def read_rows_off_by(self, shift):
        def off(hidden, token_ids, params):
            rows, targets = right(hidden, token_ids, params)
            if params.extra_kwargs:
                rows = hidden.roll(-shift, 0)[-len(rows) - 1 : -1]

            return rows, targets

        head._response_rows = off if shift else right
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tiny_model, tmp_path_factory):
    """Untied head, the whole vocabulary as candidates, whole prefills. An extension of vLLM's
    worker can put the head one row off in the engine's own process.
    """
    model = tiny_model("llama", seed=4, scale=0.2)
    extension = tmp_path_factory.mktemp("extension")
    (extension / "row_off.py").write_text(ROW_OFF)
    native = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2 * MAX_TOKENS}
    config = TeacherConfig(
        model=model,
        dtype="float32",
        vllm={**SMALL, **native, "worker_extension_cls": "row_off.Worker"},
    )
    top_k = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(extension)
        scorer = await VllmTeacherScorer.start(
            config,
            top_k=top_k,
            max_sequence_tokens=MAX_TOKENS,
        )

    yield scorer, config
    await scorer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mapped(tmp_path_factory):
    """A chat teacher for a base student, with rows that name no token; all rows are candidates."""
    tokenizer = train_tokenizer(["The river runs past the old mill."], 280)
    model = build_model("llama", tokenizer, seed=5, scale=0.2)
    model.resize_token_embeddings(len(tokenizer) + PADDING_ROWS)
    config = TeacherConfig(
        model=write_model(tmp_path_factory.mktemp("mapped"), model, tokenizer),
        dtype="float32",
        eos_remap={OWN_END: THEIR_END},
        vllm=SMALL,
    )
    top_k = len(tokenizer) + PADDING_ROWS
    scorer = await VllmTeacherScorer.start(
        config,
        top_k=top_k,
        max_sequence_tokens=MAX_TOKENS,
    )
    yield scorer, config
    await scorer.close()


async def test_float32_signal_equals_the_oracle_when_prefills_are_cut(chunked):
    scorer, config = chunked
    worst, _ = await worst_deviations(
        scorer,
        config.model,
        torch.float32,
        config.temperature,
    )
    assert max(worst.values()) < 1e-4, worst


async def test_float32_signal_equals_the_oracle_when_prefills_are_whole(whole):
    scorer, config = whole
    worst, _ = await worst_deviations(
        scorer,
        config.model,
        torch.float32,
        config.temperature,
    )
    assert max(worst.values()) < 1e-4, worst


async def test_the_header_gains_sums_over_response_tokens(chunked):
    scorer, _ = chunked
    stored = trajectory([5, 6, 7], [8, 9, 10])
    result = await scorer.score(stored)
    signal = result.body.signal
    assert result.body.trajectory is stored.body
    assert signal.teacher == "teacher"
    sums = dict(result.header.sums)
    assert sums.pop("score_s") > 0.0
    assert sums == pytest.approx(
        {
            "generate_s": 1.5,
            "teacher_logprob": float(signal.token_logprobs.sum()),
            "teacher_entropy": float(signal.entropy.entropy.sum()),
        }
    )
    assert replace(result.header, sums=stored.header.sums) == stored.header


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        ([5] * MAX_TOKENS, "maximum context length"),
        ([5, 1 << 20], "outside its vocabulary"),
    ],
    ids=["too long", "unknown token"],
)
async def test_a_request_that_fails_is_a_value_and_the_engine_lives_on(chunked, response, detail):
    scorer, _ = chunked
    bad = trajectory([5, 6, 7], response)
    lost, scored = await asyncio.gather(scorer.score(bad), scorer.score(trajectory([5], [6])))
    assert isinstance(lost, LostTrajectory)
    assert lost.key == bad.header.key
    assert lost.reason == LostReason.TEACHER_FAILED
    assert detail in lost.detail
    assert isinstance(scored, Stored)


@pytest.mark.slow
async def test_tensor_parallelism_changes_no_score(tiny_model):
    """Vocabulary and attention heads lie on two workers; either one's head scores all of it."""
    config = TeacherConfig(
        model=tiny_model("llama", seed=4, scale=0.2),
        dtype="float32",
        vllm={**SMALL, "tensor_parallel_size": 2},
    )
    scorer = await VllmTeacherScorer.start(
        config,
        top_k=16,
        max_sequence_tokens=MAX_TOKENS,
    )

    try:
        worst, _ = await worst_deviations(scorer, config.model, torch.float32, 1.0)
    finally:
        await scorer.close()

    assert max(worst.values()) < 5e-5, worst


@pytest.mark.parametrize("stop", StopReason)
async def test_a_teacher_reads_its_own_end_token_and_answers_with_the_students(mapped, stop):
    scorer, config = mapped
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).double()
    stored = trajectory([5, 6, 7], [8, 9, 10, OWN_END])
    stored = replace(stored, body=replace(stored.body, stop_reason=stop))
    result = await scorer.score(stored)
    assert result.body.trajectory is stored.body
    read = [8, 9, 10, THEIR_END if stop is StopReason.END_TOKEN else OWN_END]
    probs = np.exp(oracle(model, trajectory([5, 6, 7], read).body, 1.0))
    num_tokens = probs.shape[1] - PADDING_ROWS
    expected = probs[:, :num_tokens].copy()
    expected[:, OWN_END] += expected[:, THEIR_END]
    expected[:, THEIR_END] = 0.0
    signal = result.body.signal
    got = np.zeros_like(probs)
    np.add.at(got, (np.arange(4)[:, None], signal.topk_ids), np.exp(signal.topk_logprobs))
    np.testing.assert_allclose(got[:, :num_tokens], expected, atol=1e-6)
    np.testing.assert_allclose(
        np.exp(signal.tail_logprobs),
        probs[:, num_tokens:].sum(1),
        atol=1e-6,
    )
    targets = expected[range(4), stored.body.response_ids]
    np.testing.assert_allclose(np.exp(signal.token_logprobs), targets, atol=1e-6)
    np.testing.assert_allclose(
        signal.entropy.entropy,
        -(probs * np.log(probs)).sum(1),
        atol=1e-4,
    )


async def test_a_good_teacher_passes_its_self_test(chunked):
    scorer, config = chunked
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    prompt_ids = np.array([5, 6, 7, 8], np.int32)
    size = model.config.vocab_size
    report = await self_test(
        [scorer, scorer],
        prompt_ids=prompt_ids,
        vocab_size=size,
        dtype="float32",
    )
    greedy = model.generate(
        torch.tensor([[5, 6, 7, 8]]),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
    )
    assert report.continuation == tuple(greedy[0, 4:].tolist())


async def test_a_good_teacher_with_a_remap_passes_its_self_test(mapped):
    scorer, config = mapped
    report = await self_test(
        [scorer],
        prompt_ids=np.array([5, 6, 7, 8], np.int32),
        vocab_size=vocab_size(Path(config.model)),
        dtype="float32",
    )
    assert OWN_END in report.continuation, "the greedy continuation went through an end token"
    assert THEIR_END not in report.continuation


@pytest.mark.parametrize(
    ("shift", "check"),
    [
        (1, "alignment"),
        (-1, "context"),
    ],
)
async def test_a_head_one_row_off_fails_its_self_test(whole, shift, check):
    scorer, _ = whole
    await scorer._llm.collective_rpc("read_rows_off_by", args=(shift,))

    try:
        with pytest.raises(TeacherSelfTestError, match=f"replica 0: {check} is off by"):
            await self_test(
                [scorer],
                prompt_ids=np.array([5, 6, 7, 8], np.int32),
                vocab_size=320,
                dtype="float32",
            )
    finally:
        await scorer._llm.collective_rpc("read_rows_off_by", args=(0,))


DEAF = """
from eopd.teacher import head

head.ScoringHead._temperature_of = lambda self, params: 0.7

class Nothing:
    pass
"""


async def test_an_engine_of_another_temperature_does_not_start(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "deaf.py").write_text(DEAF)
    monkeypatch.syspath_prepend(tmp_path)
    config = TeacherConfig(
        model=tiny_model("llama", seed=4, scale=0.2),
        dtype="float32",
        vllm={**SMALL, "worker_extension_cls": "deaf.Nothing"},
    )
    before = set(multiprocessing.active_children())

    with pytest.raises(
        TeacherSelfTestError, match="it scores at temperature 2 where 1 is configured"
    ):
        await VllmTeacherScorer.start(config, top_k=8, max_sequence_tokens=MAX_TOKENS)

    for process in set(multiprocessing.active_children()) - before:
        # vLLM kills, without waiting, what has not ended when it is asked to
        process.join(timeout=30)
        assert process.exitcode is not None


@bfloat16_engines
@pytest.mark.parametrize(
    "head_dtype",
    [
        "float32",
        pytest.param("model", marks=pytest.mark.slow),
    ],
)
async def test_a_bfloat16_teacher_is_near_the_oracle(tiny_model, head_dtype):
    config = TeacherConfig(
        model=tiny_model("qwen3", seed=3, scale=0.2),
        dtype="bfloat16",
        head_dtype=head_dtype,
        vllm=SMALL,
    )
    scorer = await VllmTeacherScorer.start(
        config,
        top_k=32,
        max_sequence_tokens=MAX_TOKENS,
    )

    try:
        worst, signals = await worst_deviations(scorer, config.model, torch.bfloat16, 1.0)
    finally:
        await scorer.close()

    assert max(worst.values()) < 0.5, worst
    # Eight significant bits make equal logits common among 32 candidates; twenty-four make them
    # rare.
    ties = np.concatenate(
        [np.diff(signal.topk_logprobs, axis=1) == 0.0 for signal in signals]
    ).mean()
    assert (ties > 0.05) if head_dtype == "model" else (ties < 0.001), ties


LOGITS = {
    "ordinary": lambda rng: rng.normal(size=(9, 50)) * 3,
    "uniform": lambda rng: np.zeros((2, 50)),
    "far above zero": lambda rng: rng.normal(size=(9, 50)) + 80,
    "a leader far ahead of the tail": lambda rng: (
        np.where(np.arange(50) < 3, 300.0, 0.0) + rng.normal(size=(9, 50))
    ),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("top_k", [1, 3, 49, 50])
async def test_the_arithmetic_is_exact_at_any_depth(name, top_k):
    logits = LOGITS[name](np.random.default_rng(top_k)).astype(np.float32)
    targets = np.arange(len(logits))
    out = torch.empty(len(logits), num_columns(top_k))
    score_logits(torch.tensor(logits), torch.tensor(targets), top_k, out=out)
    signal = read_signal(
        out.numpy(),
        teacher="t",
        num_response_tokens=len(logits),
        top_k=top_k,
    )
    logprobs = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    worst = deviations(signal, targets, logprobs)
    assert max(worst.values()) < 1e-4, worst
    assert np.isfinite(signal.tail_logprobs).all() == (top_k < 50)


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
async def test_the_float32_copy_of_a_head_is_made_once(asked):
    linear = torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)
    linear.quant_method = UnquantizedEmbeddingMethod()
    linear.tp_size = 1
    processor = torch.nn.Identity()
    processor.head_dtype = asked
    hook = head.Float32Head()
    half = torch.ones(1, 2, dtype=torch.bfloat16)
    assert hook(processor, (linear, half.float())) is None
    if asked == torch.bfloat16:
        assert hook(processor, (linear, half)) is None
        return

    first = hook(processor, (linear, half, "bias"))
    second = hook(processor, (linear, half))
    assert first[1:] == (half, "bias")
    assert second[0] is first[0]
    assert torch.equal(first[0].weight, linear.weight.float())
    assert first[0].weight.dtype == torch.float32
    assert linear.weight.dtype == torch.bfloat16


async def test_missing_rows_raise_and_warm_up_does_not():
    from vllm import PoolingParams

    hidden, ids = torch.zeros(4, 2), torch.arange(4)
    rows, targets = head._response_rows(
        hidden,
        ids,
        PoolingParams(extra_kwargs={head.RESPONSE_TOKENS: 3}),
    )
    assert (len(rows), targets.tolist()) == (3, [1, 2, 3])
    with pytest.raises(RuntimeError, match="needs one more"):
        head._response_rows(
            hidden,
            ids,
            PoolingParams(extra_kwargs={head.RESPONSE_TOKENS: 4}),
        )

    rows, targets = head._response_rows(hidden, ids[:1], PoolingParams())
    assert (len(rows), len(targets)) == (1, 1)


async def test_twins_exist_once_and_keep_config_hooks():
    head.register()
    head.register()
    twins = [name for name in MODELS_CONFIG_MAP if name.startswith(head.PREFIX)]
    assert "EopdScoringGptOssForCausalLM" in twins
    assert all(
        MODELS_CONFIG_MAP[twin] is MODELS_CONFIG_MAP[twin.removeprefix(head.PREFIX)]
        for twin in twins
    )
    with pytest.raises(TypeError, match="no language model"):
        getattr(head, "EopdScoringBertModel")  # noqa: B009

    with pytest.raises(AttributeError):
        getattr(head, "Nonsense")  # noqa: B009


async def test_native_options_win_and_nested_ones_are_merged(tiny_model):
    config = TeacherConfig(
        model=tiny_model("llama", seed=4, scale=0.2),
        head_dtype="model",
        vllm={"enforce_eager": False, "hf_overrides": {"rope_theta": 5.0}},
    )
    options = engine_options(config, top_k=5, max_sequence_tokens=64)
    assert options["enforce_eager"] is False
    assert options["hf_overrides"] == {
        "rope_theta": 5.0,
        "architectures": ["EopdScoringLlamaForCausalLM"],
        "head_dtype": "model",
    }
    native = {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
    }
    through = engine_options(
        config.model_copy(update={"vllm": native}),
        top_k=5,
        max_sequence_tokens=64,
    )
    assert {name: through[name] for name in native} == native
    with pytest.raises(ConfigError, match=r"/nowhere/config\.json: cannot be read"):
        engine_options(
            TeacherConfig(model=Path("/nowhere")),
            top_k=5,
            max_sequence_tokens=64,
        )
