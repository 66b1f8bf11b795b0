"""The shapes of a model, read from its ``config.json``: the model is made without weights, and counted.

That is the same for every family that transformers knows. A tied head is counted once. Left out:
attention that keeps something else than keys and values of every head (latent attention, linear
attention), which is counted as if it kept those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from eopd.config import ConfigError, LoraConfig
from eopd.learner.attention import choose_attention
from eopd.learner.fitness import open_without_weights

_WINDOWED = ("sliding_attention", "chunked_attention")
_GATED = ("gate_proj", "gate_up_proj", "w1")  # of a layer whose MLP multiplies two products


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a decoder, in elements.

    ``norms`` counts the norms over the hidden size in a layer. RMSNorm multiplies with its weight in the
    model's type, that of Gemma in float32. ``mlp_kept`` is what the MLP of a layer keeps of a token for its
    backward pass: of a gated one both products, the activation and what goes into the last product.
    ``windowed_layers`` attend to the last ``window`` tokens alone.
    """

    name: str
    parameters: int
    trained: int
    largest_tensor: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_kept: int
    norms: int
    norm_kind: Literal["rms", "gemma", "layer"]
    has_head_norms: bool
    vocabulary: int
    windowed_layers: int
    window: int
    eager_attention: bool
    has_softcap: bool
    quantised: str | None

    @property
    def held(self) -> int:
        """The parameters that the learner holds: the model's, and those of its adapters."""
        return self.parameters + (0 if self.trained == self.parameters else self.trained)

    def kv_tokens(self, tokens: int) -> int:
        """Returns for how many tokens keys and values are kept, summed over the layers, of a
        sequence of so many tokens.
        """
        full = self.layers - self.windowed_layers
        return full * tokens + self.windowed_layers * min(tokens, self.window)


@cache
def read_architecture(directory: Path, lora: LoraConfig | None = None) -> Architecture:
    """Reads the shapes of a model; ``lora`` makes its adapters what is trained.

    Raises:
        ConfigError: transformers knows no such model, the config lacks a size, or the adapters match
            no layer.
    """
    model = open_without_weights(directory)
    config = model.config.get_text_config()
    plain = config.to_dict()
    layer = _first_layer(model)
    norms = [module for module in layer.modules() if type(module).__name__.endswith("Norm")]
    hidden = _size(directory, config, "hidden_size")
    heads = _size(directory, config, "num_attention_heads")
    layers = _size(directory, config, "num_hidden_layers")
    hidden_norms = [norm for norm in norms if _norm_size(norm) in (None, hidden)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    kinds = plain.get("layer_types") or [_WINDOWED[0]] * layers
    windowed = sum(kind in _WINDOWED for kind in kinds)
    window = plain.get("sliding_window") or plain.get("attention_chunk_size")
    quantisation = getattr(model.config, "quantization_config", None) or {}

    return Architecture(
        name=type(model).__name__,
        parameters=parameters,
        trained=parameters if lora is None else _adapter_size(model, lora),
        largest_tensor=largest,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        mlp_kept=_mlp_kept(layer, config),
        norms=len(hidden_norms),
        norm_kind=_norm_kind(norms),
        has_head_norms=len(norms) > len(hidden_norms),
        vocabulary=_size(directory, config, "vocab_size"),
        windowed_layers=windowed if window else 0,
        window=window or 0,
        eager_attention=choose_attention(plain) == "eager",
        has_softcap=plain.get("final_logit_softcapping") is not None,
        quantised=quantisation.get("quant_method"),
    )


def _first_layer(model: PreTrainedModel) -> nn.Module:
    """Returns the first decoder layer: what transformers would compute again in a backward pass."""
    modules = model.get_decoder().modules()  # not those of a vision tower, which may come first
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(model).__name__}: has no decoder layers that can be told apart")

    first: nn.Module = layers[0]
    return first


def _norm_size(norm: nn.Module) -> int | None:
    """Returns over how many dimensions a norm goes; None where it has no weight to tell."""
    return next((parameter.numel() for parameter in norm.parameters()), None)


def _norm_kind(norms: Sequence[nn.Module]) -> Literal["rms", "gemma", "layer"]:
    if any(isinstance(norm, nn.LayerNorm) for norm in norms):
        return "layer"

    return "gemma" if any(type(norm).__name__.startswith("Gemma") for norm in norms) else "rms"


def _mlp_kept(layer: nn.Module, config: PreTrainedConfig) -> int:
    """Returns the elements that an MLP keeps of a token; of experts, those that a token is sent to."""
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    names |= {name.rpartition(".")[2] for name, _ in layer.named_parameters()}
    widths = 4 if names.intersection(_GATED) else 2
    is_mixture = any(".experts." in f".{name}" for name, _ in layer.named_parameters())
    if is_mixture:
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        copies = config.num_experts_per_tok
        return int(copies * (widths * width + 2 * config.hidden_size))

    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return widths * (max(width) if isinstance(width, list) else int(width))


def _adapter_size(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Returns the parameters of the adapters, which are put into the model."""
    from eopd.learner.lora import add_adapters

    with torch.device("meta"):
        add_adapters(model, lora, seed=0)

    return sum(math.prod(one.shape) for one in model.parameters() if one.requires_grad)


def _size(directory: Path, config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{directory / 'config.json'}: {name} must be a whole number of 1 or more, is {value}"
        )

    return value
