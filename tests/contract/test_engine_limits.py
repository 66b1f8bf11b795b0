"""How many sequences and tokens a vLLM engine works on at a time."""

import pytest
from vllm import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from eopd.async_llm import usage_context


def test_on_gpus_the_use_is_one_for_which_vllm_has_limits():
    tokens, sequences = AsyncEngineArgs.get_batch_defaults(world_size=1)
    context = usage_context(on_cpu=False)
    assert tokens[context] > 2048
    assert sequences[context] > 128
    assert UsageContext.ENGINE_CONTEXT not in tokens, "AsyncLLM's own has limits now: read them"


@pytest.mark.parametrize(("on_cpu", "expected"), [(True, (128, 2048)), (False, (256, 4096))])
def test_an_engine_gets_the_limits_of_its_use(tiny_model, on_cpu, expected):
    args = AsyncEngineArgs(
        model=str(tiny_model("llama", seed=0)),
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
    )
    context = usage_context(on_cpu=on_cpu)
    scheduler = args.create_engine_config(context).scheduler_config
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == expected
