"""Attention over packed rows: which one a student is loaded with, and the one for GPUs.

    input_ids       5 6 7 8 │ 9 4
    position_ids    0 1 2 3 │ 0 1      ──▶  cu_seq_lens_q  0 4 6,  max_length_q  4

transformers makes a mask of all tokens by all tokens where sequences are packed. A GPU has no fast
kernel for that: its work grows with the square of the micro-batch, however short the sequences are.
The attention registered here hands the ends of the sequences to torch's variable-length kernel.

Checked against transformers 5.19 (``masking_utils.py`` makes no mask for an attention it does not
know; ``cu_seq_lens_q`` and ``max_length_q`` are its ``FlashAttentionKwargs``) and torch 2.13.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eopd.config import ConfigError

VARLEN = "eopd_varlen"

# What torch's kernel takes: the least compute capability, and the largest dimension of a head.
_LEAST_CAPABILITY, _LARGEST_HEAD = (8, 0), 256

# Keys of configs whose attention the kernel cannot do: chunks, and values of another width.
_BEYOND_VARLEN = ("attention_chunk_size", "v_head_dim")

# What a mask and its copy in half precision take a pair of tokens, and what is refused.
_MASK_BYTES, _MOST_MASK_BYTES = 3, 8 * 2**30

_log = logging.getLogger(__name__)


def choose_attention(
    family: type[PreTrainedModel] | None,
    text_config: Mapping[str, object],
    *,
    dtype: str,
    capability: tuple[int, int] | None,
) -> str:
    """Returns the ``attn_implementation`` to load with, on a GPU of a compute capability, or on none.

    ``eager`` under a soft-cap: SDPA drops it silently, as FlashAttention below 2.6 does
    (transformers 5.19). The variable-length kernel on GPUs in half precision, where the model class
    takes FlashAttention; some take only kernels that know attention sinks. ``sdpa`` otherwise;
    transformers raises ValueError for model classes without it.
    """
    if text_config.get("attn_logit_softcapping") is not None:
        return "eager"

    if family is None or capability is None or dtype == "float32":
        return "sdpa"

    others = getattr(family, "_compatible_flash_implementations", None)
    takes_flash = family._supports_flash_attn and (others is None or "flash_attention_2" in others)
    is_plain = all(text_config.get(key) is None for key in _BEYOND_VARLEN)
    head_dim = _head_dim(text_config)
    fits = head_dim <= _LARGEST_HEAD and head_dim % 8 == 0

    if takes_flash and is_plain and fits and capability >= _LEAST_CAPABILITY:
        return VARLEN

    return "sdpa"


def check_mask(model: PreTrainedModel, *, device: torch.device, token_budget: int) -> None:
    """Says what a mask over all packed tokens costs on a GPU.

    Raises:
        ConfigError: it takes more than 8 GiB.
    """
    attention = model.config.get_text_config()._attn_implementation
    if device.type != "cuda" or attention == VARLEN:
        return

    mask_bytes = _MASK_BYTES * token_budget**2
    cost = (
        f"learner.token_budget: {token_budget} tokens are attended to with a mask of "
        f"{mask_bytes / 1e9:.2g} GB, since {type(model).__name__} cannot be given torch's "
        f"variable-length attention here (it has {attention}, in {model.dtype})"
    )
    if mask_bytes > _MOST_MASK_BYTES:
        raise ConfigError(f"{cost}; at most {int((_MOST_MASK_BYTES / _MASK_BYTES) ** 0.5)} tokens")

    _log.warning("%s; attention takes time and memory by the square of it", cost)


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


def _head_dim(text_config: Mapping[str, object]) -> int:
    explicit = text_config.get("head_dim")
    if isinstance(explicit, int):
        return explicit

    hidden, heads = text_config.get("hidden_size"), text_config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else 0


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
