"""Low-rank adapters: all that is trained then, and sent alone or merged. Also which tensors are sent
without them (``whole_tensors``).

    y = W x + scale B (A x)                 in the learner; scale = alpha / rank, W frozen, B zero at first
    A and B                                 on the wire to engines that have W
    W + scale B A, under W's plain name     on the wire to others, and in the exported model
    A and B, in peft's own files            in the exported adapter

The only file that knows peft (checked against 0.21.2). Left out: dropout, under which the
log-probabilities that the objective compares would be those of a random subnetwork, not of the
policy that sampled.
"""

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eopd.adapters import LORA_A, LORA_B, CheckpointTensor, merge
from eopd.config import ConfigError, LoraConfig
from eopd.run.storage import replaced

_ALL_LINEAR, _ADAPTER = "all-linear", "default"


def check_targets(directory: Path, config: LoraConfig) -> None:
    """Find out on a model without weights whether ``target_modules`` can be adapted.

    Raises:
        ConfigError: see ``add_adapters``.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        add_adapters(model, config, seed=0)


def add_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
    """Put adapters into ``model``, in its dtype, and freeze the rest. Equal seeds give equal
    adapters.

    Raises:
        ConfigError: a target matches nothing, the embedding, the output head, or what is no linear
            layer; or peft adapts something else (the fused experts that carry the name of another
            layer, as in DeepSeek-V3).
    """
    targets = _target_layers(model, config)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, target_modules=targets
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
        except ValueError as error:
            raise ConfigError(f"student.lora.target_modules: {error}") from None

    adapted = {name for name, _ in _adapted(model)}
    if adapted != set(targets):
        raise ConfigError(
            f"student.lora.target_modules: peft takes {_last_names(set(targets) - adapted)} of "
            f"{type(model).__name__} for something else; name other layers"
        )


def whole_tensors(model: PreTrainedModel) -> dict[str, CheckpointTensor]:
    """Returns every tensor of ``model`` by its plain name: a tied one once, adapted ones merged."""
    layers = dict(_adapted(model))
    done = {id(part) for tensor in adapter_tensors(model).values() for part in tensor.parts}
    tensors: dict[str, CheckpointTensor] = {}

    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in done:
            continue

        done.add(id(tensor))
        owner, _, leaf = name.rpartition(".base_layer.")
        layer = layers.get(owner)
        if layer is None:
            tensors[name] = CheckpointTensor((tensor,))
        elif leaf == "weight":
            adapter = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            tensors[f"{owner}.{leaf}"] = CheckpointTensor(
                (tensor, *adapter), partial(merge, scale=layer.scaling[_ADAPTER])
            )
        else:
            tensors[f"{owner}.{leaf}"] = CheckpointTensor((tensor,))

    return tensors


def adapter_tensors(model: PreTrainedModel) -> dict[str, CheckpointTensor]:
    """Returns the adapters' tensors by the names that engines (``eopd/adapters.py``) and, behind a
    prefix, peft's files know them by.
    """
    return {
        f"{name}{end}": CheckpointTensor((part[_ADAPTER].weight,))
        for name, layer in _adapted(model)
        for end, part in ((LORA_A, layer.lora_A), (LORA_B, layer.lora_B))
    }


def save_adapter(
    directory: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor], *, source: Path
) -> None:
    """Write the adapter as ``peft.PeftModel.from_pretrained`` reads it, whole or not at all;
    replaces an older one.

    Args:
        directory: where to write.
        model: what the adapter belongs to.
        tensors: whole tensors on the CPU, by the names of ``adapter_tensors``.
        source: the directory of the model that was adapted.
    """
    settings = copy.copy(model.peft_config[_ADAPTER])
    settings.base_model_name_or_path, settings.inference_mode = str(source), True
    settings.target_modules = sorted(settings.target_modules)
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    with replaced(directory) as partial_directory:
        settings.save_pretrained(partial_directory)
        file = partial_directory / SAFETENSORS_WEIGHTS_NAME
        save_file(prefixed, file, metadata={"format": "pt"})
        shutil.copymode(partial_directory / CONFIG_NAME, file)  # as in ``export.py``


def _adapted(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    return (
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)
    )


def _target_layers(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Returns the paths of the layers that ``target_modules`` name, in the model's order."""
    special = (model.get_input_embeddings(), model.get_output_embeddings())
    layers = dict(model.named_modules())
    linear = [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and layer not in special
    ]
    chosen: set[str] = set()

    for target in config.target_modules:
        matches = (
            linear
            if target == _ALL_LINEAR
            else [name for name in layers if f".{name}".endswith(f".{target}")]
        )
        where = f"student.lora.target_modules: {target!r}"
        if not matches:
            hint = (
                f"its linear layers are {_last_names(linear)}"
                if linear
                else "it has no linear layers"
            )
            raise ConfigError(f"{where} matches no layer of {type(model).__name__}; {hint}")

        for layer in (layers[name] for name in matches):
            if layer in special:
                raise ConfigError(
                    f"{where} is the embedding or the output head; they take no adapter, "
                    "since the loss reads the head"
                )

            if not isinstance(layer, nn.Linear):
                raise ConfigError(
                    f"{where} is a {type(layer).__name__}; only linear layers can be adapted"
                )

        chosen.update(matches)

    return [name for name in linear if name in chosen]


def _last_names(paths: Iterable[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
