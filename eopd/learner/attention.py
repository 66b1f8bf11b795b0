"""Attention over packed rows: which one a student is loaded with, and one that goes by sequences.

    input_ids       5 6 7 8 │ 9 4
    position_ids    0 1 2 3 │ 0 1      ──▶  cu_seq_lens_q  0 4 6,  max_length_q  4

transformers makes a mask of all tokens by all tokens where sequences are packed, and its work grows
with the square of the micro-batch, however short the sequences are: of 12 sequences of 80 tokens
eleven twelfths are thrown away. The attention registered here is told where they end. On a GPU it is
torch's variable-length kernel, on a CPU torch's usual one, a sequence at a time.

Checked against transformers 5.19 (``masking_utils.py`` makes no mask for an attention it does not
know; ``cu_seq_lens_q`` and ``max_length_q`` are its ``FlashAttentionKwargs``) and torch 2.13.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eopd.config import ConfigError

VARLEN = "eopd_varlen"

# What torch's kernel takes: the least compute capability, and the largest dimension of a head.
_LEAST_CAPABILITY, _LARGEST_HEAD = (8, 0), 256

# Keys of configs whose attention the kernel cannot do: chunks, and values of another width.
_BEYOND_VARLEN = ("attention_chunk_size", "v_head_dim")

# Families that tell their window to the mask alone (transformers 5.19).
_WINDOW_IN_MASK = ("phimoe", "qwen2_moe")

# How far hidden states may be from those under SDPA, relative to their norm.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}

# What the tensors of all pairs of tokens may take.
_MOST_PAIR_BYTES = 8 * 2**30

_log = logging.getLogger(__name__)


def choose_attention(text_config: Mapping[str, object]) -> str:
    """Returns the ``attn_implementation`` to load with: ``eager`` under a soft-cap, which SDPA drops
    silently (transformers 5.19), else ``sdpa``; transformers raises ValueError for model classes
    without that.
    """
    return "sdpa" if text_config.get("attn_logit_softcapping") is None else "eager"


def may_take_varlen(
    model: PreTrainedModel, *, dtype: str, capability: tuple[int, int] | None
) -> bool:
    """Returns whether attention by sequences is worth a try: for a model that takes FlashAttention
    (some take only kernels that know attention sinks), and on a GPU of some compute capability in
    half precision; ``capability`` is None on a CPU.
    """
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return False

    config = model.config.get_text_config().to_dict()
    others = getattr(model, "_compatible_flash_implementations", None)
    takes_flash = model._supports_flash_attn and (others is None or "flash_attention_2" in others)
    is_plain = all(config.get(key) is None for key in _BEYOND_VARLEN)
    hides_window = (
        config.get("model_type") in _WINDOW_IN_MASK and config.get("sliding_window") is not None
    )
    head_dim = _head_dim(config)
    fits = 0 < head_dim <= _LARGEST_HEAD and head_dim % 8 == 0
    is_able = capability is None or (
        capability >= _LEAST_CAPABILITY and fits and dtype != "float32"
    )

    return bool(takes_flash and is_plain and not hides_window and is_able)


def try_varlen(model: PreTrainedModel, dtype: str, hidden_states: Callable[[], Tensor]) -> None:
    """Gives a model the attention by sequences, and takes it back where hidden states of packed
    sequences are no more what they are under SDPA: layers that do not hand on what they are called
    with, or heads of several widths.
    """
    expected = hidden_states().float()
    model.set_attn_implementation(VARLEN)

    try:
        found = hidden_states().float()
        is_same = bool((found - expected).norm() <= _TOLERANCE[dtype] * expected.norm())
        reason = "hidden states differ"
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        is_same, reason = False, repr(error)

    if not is_same:
        _log.warning(
            "%s does not attend by sequences (%s): it attends to all pairs of packed tokens, whose "
            "cost grows with the square of learner.token_budget",
            type(model).__name__,
            reason,
        )
        model.set_attn_implementation("sdpa")


def check_mask(model: PreTrainedModel, *, device: torch.device, token_budget: int) -> None:
    """Says what attention to all pairs of packed tokens costs on a GPU.

    Raises:
        ConfigError: its tensors take more than 8 GiB.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if device.type != "cuda" or attention == VARLEN:
        return

    width = model.dtype.itemsize
    # SDPA has a mask and its copy; eager has scores of every head, and once more in float32.
    pair_bytes = 1 + width if attention == "sdpa" else config.num_attention_heads * (width + 4)
    cost = (
        f"learner.token_budget: attention to all pairs of {token_budget} tokens takes "
        f"{pair_bytes * token_budget**2 / 1e9:.2g} GB, since {type(model).__name__} cannot be given "
        f"torch's variable-length attention here (it has {attention}, in {model.dtype})"
    )
    most_tokens = int((_MOST_PAIR_BYTES / pair_bytes) ** 0.5)
    if token_budget > most_tokens:
        raise ConfigError(f"{cost}; at most {most_tokens} tokens")

    _log.warning("%s; its time and memory grow with the square of it", cost)


def sequences_of(model: PreTrainedModel, position_ids_T: Tensor) -> dict[str, Tensor | int]:
    """Returns where packed sequences end, as arguments of a model's forward pass; none where its
    attention reads that from its mask.
    """
    if model.config.get_text_config()._attn_implementation != VARLEN:
        return {}

    starts_N = (position_ids_T == 0).nonzero().squeeze(1)
    ends_N = torch.cat([starts_N, starts_N.new_tensor([len(position_ids_T)])])
    return {
        "cu_seq_lens_q": ends_N.to(torch.int32),
        "max_length_q": int(ends_N.diff().max()),
    }


def varlen_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attends causally within packed sequences; without their ends, within each row of the batch.

    Returns:
        The output [B, T, H, D], and no weights, as transformers asks for.
    """
    batch, _heads, length, _dim = query_BHTD.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=query_BHTD.device
        )
        max_length_q = length

    query, key, value = (
        states.transpose(1, 2).flatten(0, 1) for states in (query_BHTD, key_BHTD, value_BHTD)
    )
    if query.device.type == "cpu":
        lengths = cu_seq_lens_q.diff().tolist()
        output_THD = _each_sequence(query, key, value, lengths, scaling, sliding_window)
        return output_THD.unflatten(0, (batch, length)), None  # type: ignore[no-untyped-call]

    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output.unflatten(0, (batch, length)), None  # type: ignore[no-untyped-call]


def _each_sequence(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    lengths: Sequence[int],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Returns the output [T, H, D] of sequences of these lengths, for H heads in G groups."""
    outputs = []
    states = (states.split(lengths) for states in (query_THD, key_TGD, value_TGD))  # type: ignore[no-untyped-call]
    for length, sequence in zip(lengths, zip(*states, strict=True), strict=True):
        mask = None
        if window is not None and window < length:
            mask = _window_mask(max(lengths), window, query_THD.dtype)[:length, :length]

        query, key, value = (part.transpose(0, 1)[None] for part in sequence)
        output = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))

    return torch.cat(outputs)


@lru_cache(maxsize=1)
def _window_mask(length: int, window: int, dtype: torch.dtype) -> Tensor:
    """Returns what is added to the scores [length, length], once for all layers of a pass."""
    sees = torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~sees, -torch.inf)


def _head_dim(text_config: Mapping[str, object]) -> int:
    explicit = text_config.get("head_dim")
    if isinstance(explicit, int):
        return explicit

    hidden, heads = text_config.get("hidden_size"), text_config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else 0


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
