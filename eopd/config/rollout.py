"""The engines that write, and what an engine of vLLM may be told."""

from typing import Final, Self

from pydantic import Field, model_validator

from eopd.config.base import (
    Actors,
    Cpus,
    Gpus,
    NativeOptions,
    Seconds,
    Section,
    Temperature,
    Threads,
    Tokens,
    refuse,
    require_gpus_for_workers,
)

_ONE_NODE: Final = (
    "an engine lives in one process group on one node; raise the number of engines instead"
)
_CONTEXT: Final = "an engine answers for whole sequences; only tensor and pipeline parallelism work"
_SOFTMAX: Final = "samples come from the plain softmax at rollout.temperature"
OWNED_BY_ENGINES: Final = {
    "model": "the key model beside vllm says it",
    "tokenizer": "the one of the model is used, since prompts go to an engine as its token ids",
    "dtype": "the key dtype says it",
    "max_model_len": "prompts.max_tokens and max_response_tokens say it",
    "enable_prefix_caching": "cached prefixes would hold numbers of other weights",
    "data_parallel_size": _ONE_NODE,
    "data_parallel_rank": _ONE_NODE,
    "data_parallel_start_rank": _ONE_NODE,
    "data_parallel_size_local": _ONE_NODE,
    "data_parallel_address": _ONE_NODE,
    "data_parallel_rpc_port": _ONE_NODE,
    "data_parallel_hybrid_lb": _ONE_NODE,
    "data_parallel_external_lb": _ONE_NODE,
    "data_parallel_multi_port_external_lb": _ONE_NODE,
    "data_parallel_backend": _ONE_NODE,
    "nnodes": _ONE_NODE,
    "node_rank": _ONE_NODE,
    "master_addr": _ONE_NODE,
    "master_port": _ONE_NODE,
    "prefill_context_parallel_size": _CONTEXT,
    "decode_context_parallel_size": _CONTEXT,
    "enable_lora": "engines get whole weights; student.lora trains adapters",
}
OWNED_BY_ROLLOUT: Final = {
    **OWNED_BY_ENGINES,
    "model": "student.model says it",
    "dtype": "student.dtype says it",
    "scheduling_policy": "the check of the weights goes before other requests",
    "logprobs_mode": "the learner needs the probabilities that were sampled from",
    "weight_transfer_config": "the weights section says it",
    "worker_extension_cls": "weights arrive through it",
    "generation_config": _SOFTMAX,
    "override_generation_config": _SOFTMAX,
    "logits_processors": _SOFTMAX,
    "runner": "a rollout engine writes",
}


class RolloutConfig(Section):
    """The engines that write. Training samples come from the plain softmax at ``temperature``; the
    learner uses the same. An engine that does not finish a response within ``timeout_s`` has
    failed; the response is tried elsewhere.
    """

    engines: Actors = 1
    cpus: Cpus = 1.0
    gpus: Gpus = 0.0
    threads: Threads = 1
    samples_per_prompt: int = Field(1, ge=1, le=10_000)
    max_response_tokens: Tokens = 1024
    temperature: Temperature = 1.0
    timeout_s: Seconds = 1800.0
    vllm: NativeOptions = {}

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("vllm", self.vllm, OWNED_BY_ROLLOUT)
        require_gpus_for_workers(self.gpus, self.vllm)
        return self
