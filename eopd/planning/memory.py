"""What a learner's rank and an engine hold, in bytes: formulas of sizes, and nothing else.

Letters: P parameters, of which p are trained; N ranks; w, ``width``, bytes of the student's type (4
in float32, 2 in bfloat16); T tokens of a micro-batch; V vocabulary; D hidden size; C rows of a chunk
of logits, all T where the learner's section has none.

The states follow DeepSpeed 0.19.8 with the options of ``learner/deepspeed_backend.py``, the
activations the modules of transformers 5.19, which no compiler fuses. Left out: what a process
takes before it has a model, and what an allocator cannot use of what it has.
"""

from dataclasses import dataclass
from typing import Final

from eopd.config import LearnerConfig
from eopd.planning.architecture import Architecture

FULL: Final = 4  # bytes of float32
_BUCKET: Final = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
_LIVE: Final = 1_000_000_000  # elements: its stage3_max_live_parameters
_KEPT_BY_STEP: Final = 3  # float32 rows of logits that vLLM's sampler holds at a time

Parts = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What a rank holds between two steps: on its device, and in host memory beside a GPU."""

    device: Parts
    host: Parts


def learner_states(model: Architecture, learner: LearnerConfig, width: int) -> States:
    """Returns weights, gradients, float32 masters, AdamW's two moments, and DeepSpeed's buffers.

    Bytes of a trained parameter on each of N ranks, as DeepSpeed's classes hold them:

        stage, type      weights   gradients   masters   moments
        0 float32        4         4           -         8           (plain AdamW)
        0 bfloat16       2         2           4         8           (FP16_UnfusedOptimizer)
        1 float32        4         4           4/N       8/N         (DeepSpeedZeroOptimizer)
        1 bfloat16       2         2 + 4       4/N       8/N         (BF16_Optimizer)
        2                w         (w + 4)/N   4/N       8/N         (DeepSpeedZeroOptimizer)
        3                w/N       4/N         4/N       8/N         (DeepSpeedZeroOptimizer_Stage3)

    In stage 1 and 2 the masters of a float32 student are a copy too. Frozen weights have nothing but
    themselves. Stages 1 (in float32, or offloaded), 2 and 3 reduce gradients in a bucket of 500
    million elements, which a GPU holds in full and a CPU as far as it is filled; stage 3 gathers up
    to 1e9 parameters at a time. ``offload_optimizer`` moves masters and moments into host memory,
    with the gradients of the rank's share, ``offload_param`` the weights of stage 3.
    """
    w, stage, ranks, p = width, learner.chosen_zero_stage, learner.ranks, model.trained
    shards = ranks if stage else 1
    plain = w == FULL and stage == 0
    gradients = {
        0: w * p,
        1: (w if w == FULL else w + FULL) * p,
        2: (w + FULL) * p // ranks,
        3: FULL * p // ranks,
    }[stage]
    if stage == 1 and w < FULL and "offload_optimizer" in learner.offloaded:
        gradients = FULL * p  # accumulated in float32 alone (DeepSpeedZeroOptimizer)

    weights = w * model.held // (ranks if stage == 3 else 1)
    optimizer = {
        "float32 masters": 0 if plain else FULL * p // shards,
        "two moments": 2 * FULL * p // shards,
    }
    device = {"weights": weights, "gradients": gradients}
    host: Parts = {}

    if "offload_optimizer" in learner.offloaded:
        host = optimizer | {"gradients of the share": (FULL + w) * p // shards}
    else:
        device |= optimizer

    if "offload_param" in learner.offloaded:
        host["weights"] = device.pop("weights")

    if stage == 3:
        device["gathered weights"] = w * min(model.held, _LIVE)

    device["reduction bucket"] = _bucket(model, learner, width)
    return States(device=_some(device), host=_some(host))


def _bucket(model: Architecture, learner: LearnerConfig, width: int) -> int:
    stage = learner.chosen_zero_stage
    if stage == 0 or _is_bf16_optimizer(learner, width):
        return 0

    elements = _BUCKET if learner.gpus else min(_BUCKET, model.trained)
    return elements * (width if stage == 2 else FULL)


def _is_bf16_optimizer(learner: LearnerConfig, width: int) -> bool:
    """Whether DeepSpeed takes its ``BF16_Optimizer``."""
    is_offloaded = "offload_optimizer" in learner.offloaded
    return learner.chosen_zero_stage == 1 and width < FULL and not is_offloaded


def activations(model: Architecture, learner: LearnerConfig, width: int) -> int:
    """Returns what the backward pass of one micro-batch of T tokens needs of its forward pass.

    A decoder layer keeps of a token, as autograd saves it:

        RMSNorm        its input, the normalised input and its output: 3 D w in float32; in bfloat16
                       the input is float32: 8 D bytes, and 10 D in Gemma, whose normalised input
                       is too. One behind a sublayer keeps no output: 8 D.
        LayerNorm      its input and its output: 2 D w
        norms of heads of queries and keys, (heads + kv_heads) head_dim together: 8 bytes each, and 6
                       in bfloat16 but for Gemma
        attention      queries, keys, values and output: w head_dim (2 heads + 2 kv_heads), where a
                       mask is needed 4 heads in place of both; on a CPU, where sequences are joined
                       afterwards, the output once more; a float32 logsumexp for every head
        MLP            4 intermediate sizes where it is gated (both products, the activation, what
                       goes into the last product), else 2: w each

    Attention with a mask keeps w T^2 of it in every layer, eager attention (under a soft-cap) 8 T^2
    for every head. On a CPU windows have one mask for all layers, of the longest sequence. With
    ``activation_checkpointing`` a layer keeps its input, w D T, and the layer under way everything. To this
    come the embedding and the last norm, the hidden states and their gradient, and the gradients of
    the MLP under way, which are three quarters of what it keeps.
    """
    w, tokens, d, on_gpu = width, learner.token_budget, model.hidden, learner.gpus > 0
    in_half = {"rms": 8, "gemma": 10, "layer": 4}
    in_full = {"rms": 12, "gemma": 12, "layer": 8}
    norm = d * (in_full if w == FULL else in_half)[model.norm_kind]

    # what needs no mask: on CPUs, and on GPUs in half precision (``learner/attention.py``)
    by_sequences = (not on_gpu or w < FULL) and not model.eager_attention
    groups = 2 * model.kv_heads if by_sequences else 2 * model.heads
    outputs = 2 * model.heads if by_sequences and not on_gpu else model.heads
    heads = model.head_dim * (model.heads + groups + outputs)
    of_token = min(model.norms, 2) * norm + max(model.norms - 2, 0) * 8 * d
    of_token += w * heads + FULL * model.heads + w * model.mlp_kept
    if model.has_head_norms:
        of_element = 6 if w < FULL and model.norm_kind == "rms" else 8
        of_token += of_element * model.head_dim * (model.heads + model.kv_heads)

    of_pair = 0 if by_sequences else w
    if model.eager_attention:
        of_pair = 8 * model.heads

    layer = tokens * of_token + tokens**2 * of_pair
    kept = model.layers * layer
    if learner.activation_checkpointing:
        kept = model.layers * tokens * d * w + layer

    mask = 0 if by_sequences else tokens**2
    if by_sequences and not on_gpu and model.windowed_layers and model.window < tokens:
        mask = w * tokens**2

    ends = tokens * (norm + 2 * d * w)
    under_way = 3 * tokens * w * model.mlp_kept // 4

    return kept + mask + ends + under_way


def loss_buffers(model: Architecture, learner: LearnerConfig, width: int) -> int:
    """Returns what the chunked loss holds besides its hidden states (``loss/chunked.py``).

    The logits of a chunk, 4 C V bytes, once more under a soft-cap, and in bfloat16 the operand of the
    products, 2 C V; the gradient of the head in float32, 4 V D, which adapters do without, and
    in bfloat16 its copy in that type.
    """
    rows = min(learner.logit_chunk_tokens or learner.token_budget, learner.token_budget)
    half = width < FULL
    chunk = rows * model.vocabulary * (FULL * (1 + model.has_softcap) + (2 if half else 0))
    trains_head = model.trained == model.parameters
    head = model.vocabulary * model.hidden * (FULL + (width if half else 0))
    return chunk + (head if trains_head else 0)


def passes(model: Architecture, learner: LearnerConfig, width: int) -> Parts:
    """Returns what a rank needs for a while beside its states: the activations and the loss of one
    micro-batch, or the buffers of an update, which begins when those are gone, where they are larger.
    """
    needed = {
        "activations": activations(model, learner, width),
        "loss": loss_buffers(model, learner, width),
    }
    update = _update_buffers(model, learner, width)
    return needed if sum(needed.values()) >= update else {"buffers of an update": update}


def _update_buffers(model: Architecture, learner: LearnerConfig, width: int) -> int:
    """Returns what an update needs: under stage 0, and 1 in bfloat16, gradients are reduced in flat
    copies of up to 500 million elements, also on one rank; else, and under stage 0 in
    bfloat16, those of the rank's share become float32.
    """
    trained, stage = model.trained, learner.chosen_zero_stage
    if "offload_optimizer" in learner.offloaded:
        return 0

    if stage == 0 and width < FULL:
        return FULL * trained

    if stage == 0 or _is_bf16_optimizer(learner, width):
        return FULL * min(trained, _BUCKET)

    return FULL * trained // learner.ranks


def kv_bytes(model: Architecture, *, tokens: int, width: int, workers: int, stages: int = 1) -> int:
    """Returns the keys and values of one sequence on one of ``workers`` that share the heads.

    Two of head_dim for every key-value head, layer and token; a head that is the last one of a worker
    is not shared further, but held by several (vLLM 0.32.0). Pipeline ``stages`` share the layers.
    """
    heads = -(-model.kv_heads // workers)
    return 2 * width * heads * model.head_dim * model.kv_tokens(tokens) // stages


def engine_working(model: Architecture, *, width: int, tokens: int, rows: int, workers: int) -> int:
    """Returns an estimate of what a vLLM engine's own step needs beside weights and cache.

    Of the tokens of its batch the residual, a norm and both products of an MLP; of every sequence
    that is sampled three float32 rows of logits. Left out: CUDA graphs.
    """
    mlp = model.mlp_kept // workers
    return (
        tokens * width * (2 * model.hidden + mlp) + rows * model.vocabulary * FULL * _KEPT_BY_STEP
    )


def scoring_buffers(model: Architecture, *, rows: int, passes: int, width: int) -> int:
    """Returns what a teacher's head holds of its logits: a chunk of ``rows`` in its type, and of
    ``passes`` rows three more in float32 (scaled, exponentials, products; ``teacher/head.py``).
    """
    return model.vocabulary * (rows * width + 3 * passes * FULL)


def _some(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size}
