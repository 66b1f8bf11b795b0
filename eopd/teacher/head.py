"""The scoring head that lives inside vLLM: what a teacher says of every response token, and [T, V]
is never held.

In: hidden states of finished prefills, and in ``PoolingParams.extra_kwargs`` the number R of
response tokens and, if it is not the teacher's, a temperature. Out: per request float32 [R, 3 + 2
K] in the layout of ``signal.py``: exact entropy, log-probability of the sampled token, exact log of
the tail mass, top-k log-probabilities and ids.

``register``, which ``vllm_plugin.py`` calls in every process of vLLM, gives every architecture it
knows a scoring twin ``EopdScoring<Architecture>``. The twin is a subclass of the model's own class,
made when it is loaded, so that logit scales, soft-caps, quantised and sharded heads are the model's
own ``compute_logits``. Only rows that predict a response token reach the vocabulary projection.

Left out: architectures known only to vLLM's Transformers fallback, and pooling that starts from a
cached prefix. Checked against vLLM 0.32.0.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Final, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.tokwise import get_tok_pooling_method
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from eopd.teacher.signal import ENTROPY, MAX_EXACT_ID, TAIL, TOKEN, TOPK, num_columns

PREFIX: Final = "EopdScoring"
TASK: Final = "token_classify"
OPTIONS: Final = "eopd_scoring"  # key of vLLM's additional_config
RESPONSE_TOKENS: Final = "eopd_response_tokens"  # keys of PoolingParams.extra_kwargs
TEMPERATURE: Final = "eopd_temperature"

_PLAIN_METHODS: Final = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)

# Rows projected at once: enough to read the head's weight seldom. And rows of logits scored at
# once: on CPU so few that every pass over them but the first stays in the cache.
_CHUNK_ROWS: Final = 128 if current_platform.is_cpu() else 256
_SCORE_ROWS: Final = 16 if current_platform.is_cpu() else _CHUNK_ROWS


def register() -> None:
    """Register a scoring twin for every architecture vLLM knows; calling it again changes nothing.

    The twins are registered by name, so that nothing is imported before one is used, and keep the
    architecture's config hooks.
    """
    for architecture in tuple(ModelRegistry.get_supported_archs()):
        twin = PREFIX + architecture
        if architecture.startswith(PREFIX) or twin in ModelRegistry.models:
            continue

        ModelRegistry.register_model(twin, f"{__name__}:{twin}")
        if architecture in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[twin] = MODELS_CONFIG_MAP[architecture]


def __getattr__(name: str) -> type[nn.Module]:
    """Resolve ``EopdScoring<Architecture>`` to its class: the way vLLM loads a model
    registered by name.
    """
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__} has no attribute {name}")

    return _scoring_twin(name)


@cache
def _scoring_twin(name: str) -> type[nn.Module]:
    """Subclass a causal language model: the same model, with a pooler that scores."""
    base: type[nn.Module] = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    if not hasattr(base, "compute_logits"):
        raise TypeError(
            f"{base.__name__} has no compute_logits: it is no language model, and cannot teach"
        )

    def __init__(self: nn.Module, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_pre_hook(Float32Head())

        self.pooler = ScoringHead(cast(ComputeLogits, self.compute_logits), vllm_config)

    namespace = {
        "__module__": __name__,
        "__init__": __init__,
        "is_pooling_model": True,
        "default_tok_pooling_type": "ALL",
    }

    return type(name, (base,), namespace)


ComputeLogits = Callable[[Tensor], Tensor]


class Float32Head:
    """Forward pre-hook of a ``LogitsProcessor``: hands it a float32 copy of the head, made once.

    vLLM casts the head at every call where it projects in another precision than the model's; of a
    float32 weight that cast is free. CUDA and ROCm accumulate a 16-bit product in float32 without
    any copy, so nothing is done there. The copy is untied: embeddings keep the model's precision.
    """

    def __init__(self) -> None:
        self._copy: _PlainHead | None = None

    def __call__(self, processor: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        """Replace the head among the arguments ``(head, hidden_states, ...)``; None leaves
        them as they are.
        """
        head, hidden_states = cast(tuple[nn.Module, Tensor], args[:2])
        casts = processor.head_dtype == torch.float32 and hidden_states.dtype != torch.float32
        if (
            not casts
            or current_platform.is_cuda_alike()
            or not isinstance(head.quant_method, _PLAIN_METHODS)
        ):
            return None  # a quantised head is refused by vLLM, which says why

        if self._copy is None:
            weight = cast(Tensor, head.weight)
            self._copy = _PlainHead(
                weight.float(),
                head.quant_method,
                cast(int, head.tp_size),
            )

        return (self._copy, *args[1:])


@dataclass(frozen=True, slots=True)
class _PlainHead:
    """What ``LogitsProcessor`` asks of a head it casts."""

    weight: Tensor
    quant_method: object
    tp_size: int


class ScoringHead(Pooler):
    """Scores the response rows of every finished request, in chunks cut across requests."""

    def __init__(self, compute_logits: ComputeLogits, vllm_config: VllmConfig) -> None:
        super().__init__()
        options = vllm_config.additional_config[OPTIONS]
        vocab_size = vllm_config.model_config.get_vocab_size()
        self._compute_logits = compute_logits
        self._top_k: int = options["top_k"]
        self._temperature: float = options["temperature"]
        self._gather = get_tok_pooling_method("ALL")
        if self._top_k > vocab_size:
            raise ValueError(
                f"loss.top_k {self._top_k} is above the teacher's vocabulary of {vocab_size}"
            )

        if vocab_size > MAX_EXACT_ID:
            raise ValueError(
                f"a vocabulary of {vocab_size} has ids that float32 cannot hold "
                f"(limit {MAX_EXACT_ID})"
            )

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """The one vLLM task this head answers."""
        return {TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        """Ask the runner for token ids: the sampled tokens are among them."""
        return PoolingParamsUpdate(requires_token_ids=True)

    @torch.inference_mode()
    def forward(
        self, hidden_states: Tensor, pooling_metadata: PoolingMetadata
    ) -> list[Tensor | None]:
        """Score every request whose prefill is complete; None for the others.

        Args:
            hidden_states: [T, hidden], the rows of this engine step, requests one after another.
            pooling_metadata: vLLM's cursor, token ids and parameters of the requests.

        Returns:
            Per request float32 [R, 3 + 2 K], or None where its prefill goes on.

        Raises:
            RuntimeError: fewer rows than the response needs have arrived.
        """
        gathered = self._gather(hidden_states, pooling_metadata)
        token_ids = pooling_metadata.get_prompt_token_ids_cpu()
        selected = [
            None
            if hidden is None
            else (*_response_rows(hidden, ids, params), self._temperature_of(params))
            for hidden, ids, params in zip(
                gathered, token_ids, pooling_metadata.pooling_params, strict=True
            )
        ]
        scored = iter(self._score([request for request in selected if request is not None]))

        return [None if request is None else next(scored) for request in selected]

    def _temperature_of(self, params: PoolingParams) -> float:
        return float((params.extra_kwargs or {}).get(TEMPERATURE, self._temperature))

    def _score(self, requests: Sequence[tuple[Tensor, Tensor, float]]) -> Sequence[Tensor]:
        if not requests:
            return []

        hidden = torch.cat([rows for rows, _, _ in requests])
        targets = torch.cat([ids for _, ids, _ in requests]).to(
            hidden.device, torch.int64, non_blocking=True
        )
        heat = torch.cat(
            [torch.full((len(ids), 1), temperature) for _, ids, temperature in requests]
        ).to(hidden.device)
        out = hidden.new_empty((len(hidden), num_columns(self._top_k)), dtype=torch.float32)

        for rows, *chunk in zip(
            *(torch.split(t, _CHUNK_ROWS) for t in (hidden, targets, heat, out)), strict=True
        ):
            parts = (self._compute_logits(rows), *chunk)
            for few, ids, by, into in zip(
                *(torch.split(t, _SCORE_ROWS) for t in parts), strict=True
            ):
                score_logits(few.float().div_(by), ids, self._top_k, out=into)

        return torch.split(out, [len(rows) for rows, _, _ in requests])


def _response_rows(
    hidden: Tensor, token_ids: Tensor, params: PoolingParams
) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the response, and the tokens they predict: [R, hidden] and [R].

    Counted from the end: a request preempted in the middle of its prefill brings its first rows
    twice.
    """
    # the engine warms up with made-up requests, some with fewer ids than rows
    if params.extra_kwargs is None:
        return hidden[-1:], token_ids.new_zeros(1)

    num_response = int(params.extra_kwargs[RESPONSE_TOKENS])
    if min(len(hidden), len(token_ids)) <= num_response:
        raise RuntimeError(
            f"a response of {num_response} tokens needs one more row and token; "
            f"{len(hidden)} rows and {len(token_ids)} tokens arrived: was a part of the "
            "sequence read from the prefix cache?"
        )

    return hidden[-num_response - 1 : -1], token_ids[-num_response:]


def score_logits(logits: Tensor, targets: Tensor, top_k: int, *, out: Tensor) -> None:
    """Scores one chunk of rows: a single exponential over the vocabulary, exact at any depth of the
    tail.

    The top k and "anything else" are k + 1 outcomes; entropy follows from the chain rule, ``H =
    H(outcomes) + P(tail) H(within the tail)``, a sum of terms that cannot be negative. The
    exponential is taken relative to the largest logit of the *tail*, with the top k masked out, so
    that the tail's mass is never one minus a sum and does not underflow behind a teacher that is
    sure.

    Args:
        logits: float32 [c, V], divided by the temperature; overwritten.
        targets: int64 [c], the sampled tokens.
        top_k: K <= V.
        out: float32 [c, 3 + 2 K], filled.
    """
    vocab_size = logits.shape[1]
    top, ids = logits.topk(min(top_k + 1, vocab_size))
    best = top[:, :1]
    sampled = logits.gather(1, targets[:, None]) - best
    ids = ids[:, :top_k]
    if top_k == vocab_size:
        tail = torch.full_like(best, -torch.inf)
        within = torch.zeros_like(best)
    else:
        pivot = top[:, top_k:]
        logits.sub_(pivot)
        weights = logits.exp().scatter_(1, ids, 0.0)  # a leader may overflow to inf, and is masked
        total = weights.sum(1, keepdim=True)
        within = total.log() - torch.linalg.vecdot(weights, logits)[:, None] / total
        tail = pivot - best + total.log()

    outcomes = torch.cat((top[:, :top_k] - best, tail), dim=1)
    normalizer = outcomes.logsumexp(1, keepdim=True)
    outcomes -= normalizer
    mass = outcomes.exp()
    entropy = torch.special.entr(mass).sum(1, keepdim=True) + mass[:, -1:] * within
    out[:, ENTROPY] = entropy[:, 0]
    out[:, TOKEN] = (sampled - normalizer)[:, 0]
    out[:, TAIL] = outcomes[:, -1]
    out[:, TOPK : TOPK + top_k] = outcomes[:, :-1]
    out[:, TOPK + top_k :] = ids
