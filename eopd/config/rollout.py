"""The engines that write, and the options of vLLM that this project decides itself."""

from typing import Final, Self

from pydantic import Field, model_validator

from eopd.config.base import (
    Actors,
    Cpus,
    Gpus,
    NativeOptions,
    NodeLabels,
    SamplingTemperature,
    Seconds,
    Section,
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
    "enable_lora": "student.lora trains adapters, which engines merge into their weights",
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
    """The engines that write the responses: each is a vLLM engine with the student's weights."""

    engines: Actors = 1
    """The number of engines that write. ``eopd scale`` changes it while a run goes on."""

    cpus: Cpus = 1.0
    """The CPUs of one engine, which Ray reserves; a fraction is allowed. Those of all engines,
    replicas and ranks must be free in the cluster when the run starts.
    """

    gpus: Gpus = 0.0
    """The GPUs of one engine, which Ray reserves: ``tensor_parallel_size`` x
    ``pipeline_parallel_size`` of ``rollout.vllm``, or a share of one GPU. 0 runs on CPUs, for
    which vLLM has a build of its own (cluster/requirements-cpu.lock).
    """

    threads: Threads = 1
    """The compute threads of one engine, which are never taken from Ray. Threads that wait sleep
    (``OMP_WAIT_POLICY=PASSIVE``), since roles may share cores.
    """

    node_labels: NodeLabels = {}
    """The labels that a machine must have for an engine, such as ``{ray.io/accelerator-type: H100}``,
    which Ray gives by itself, or those of ``ray start --labels``. With none, any machine will do.
    """

    samples_per_prompt: int = Field(1, ge=1, le=10_000)
    """The number of responses to each prompt. A reward needs two or more."""

    max_response_tokens: Tokens = 1024
    """The longest response in training, in tokens. A longer one is cut there."""

    temperature: SamplingTemperature = 1.0
    """The temperature of the plain softmax from which responses are sampled; the learner uses the
    same one. Below 0.01 vLLM would sample at 0.01 and the learner would not know.
    """

    timeout_s: Seconds = 1800.0
    """The seconds in which an engine must finish a response. One that takes longer is lost, and
    sampled again; an engine that then answers nothing else either is replaced. Raise it for very
    long responses.
    """

    keep_kv: bool = False
    """Whether responses under way keep the keys and values that they read under older weights. By
    default every engine reads them again when new weights arrive: the whole response is then
    conditioned on the weights that go on with it, for the price of a prefill of all responses under
    way. Losses are right either way, since the learner computes the log-probabilities of every
    token itself; ``eopd_logprob_gap_nats`` grows where they are kept.
    """

    vllm: NativeOptions = {}
    """Options of vLLM's engine, which go to it untouched. Those that the numbers rest on, such as
    ``model``, ``dtype`` and ``logprobs_mode``, are refused, and the message says which key decides
    instead.
    """

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("vllm", self.vllm, OWNED_BY_ROLLOUT)
        require_gpus_for_workers(self.gpus, self.vllm)
        return self
