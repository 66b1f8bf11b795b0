"""Can a model directory be trained? Checked on the meta device, where a model has shapes and no
weights.

What the learner loads, what the engines serve and what is exported must be one model. So a
directory is refused whose weights have other names or shapes than the model that its
``config.json`` describes (transformers would make up what is missing), whose tied weights differ,
whose rotary embedding depends on the length of a sequence, or whose config transformers could not
write again. Checked against transformers 5.19 and vLLM 0.32.0.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from eopd.config import ConfigError
from eopd.config.json_text import told

_SHOWN: Final = 3


def check_student(directory: Path, *, num_tokens: int) -> PreTrainedModel:
    """Make the model that ``config.json`` describes, without weights.

    Args:
        directory: the student's.
        num_tokens: the longest sequence of the run.

    Raises:
        ConfigError: it is no causal language model, is quantised, or cannot be trained as vLLM
            serves it.
    """
    file = directory / "config.json"
    config = _load_config(file)
    _require_causal(file, config)
    if quantization := getattr(config, "quantization_config", None):
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise ConfigError(
            f"{file}: its weights are quantised ({method}); a student is "
            "trained in float32 or bfloat16"
        )

    for kind, parameters in _rotary_embeddings(config):
        _require_fixed_rotation(file, kind, parameters, num_tokens)

    model = _without_weights(file, config)
    _require_writable(file, model.config)

    return model


def check_weights(
    model: PreTrainedModel, where: Path, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the shapes of stored tensors with the model, by transformers' own rules of which name
    is which parameter. ``where`` is their directory.

    Raises:
        ConfigError: some are missing or of another shape.
    """
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    loaded, report = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=stored,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    name = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        unexpected = (
            f"; they hold {_some(sorted(report['unexpected_keys']))} besides"
            if report["unexpected_keys"]
            else ""
        )
        raise ConfigError(
            f"{where}: the weights lack {_some(missing)}, which {name} has{unexpected}"
        )

    if mismatched := sorted(report["mismatched_keys"]):
        key, in_file, in_model = mismatched[0][:3]
        raise ConfigError(
            f"{where}: {key} has shape {tuple(in_file)}, and config.json makes it "
            f"{tuple(in_model)} ({len(mismatched)} differ)"
        )

    _require_plain_names(where, loaded)


def _require_plain_names(where: Path, model: PreTrainedModel) -> None:
    """Refuse what transformers keeps in another form than checkpoints, and so than rollout engines:
    fused experts.

    Weights are sent by the learner's names, and vLLM passes over those that no checkpoint has. Sent
    by the names of a checkpoint, a tiny Qwen3-MoE gave log-probabilities 2.3 nats from the
    learner's on the CPU build of vLLM 0.32.0; why is not known.
    """
    names, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    stored = revert_weight_conversion(model, dict(model.state_dict())).keys()
    if changed := sorted(name for name in names if not {name, name.removeprefix(prefix)} & stored):
        raise ConfigError(
            f"{where}: transformers keeps {_some(changed)} of {type(model).__name__} in "
            "another form than a checkpoint, which rollout engines do not take in flight; "
            "such a model (fused experts, or weights under other names) can teach, and cannot be "
            "a student"
        )


def open_without_weights(directory: Path) -> PreTrainedModel:
    """Make the model that ``config.json`` describes, of any kind that transformers knows, with shapes
    and no weights.

    Raises:
        ConfigError: transformers does not know it, or its sizes do not fit each other.
    """
    file = directory / "config.json"
    return _without_weights(file, _load_config(file))


def _load_config(file: Path) -> PreTrainedConfig:
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{file}: model_type is {told(kind)}, which the installed transformers "
            f"{__version__} does not know"
        )

    try:
        return AutoConfig.from_pretrained(
            file.parent, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the family's own checks raise
        raise ConfigError(
            f"{file}: transformers cannot read it: {' '.join(str(error).split())}"
        ) from error


def _without_weights(file: Path, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # sizes that do not fit each other
        raise ConfigError(
            f"{file}: transformers can make no model of it: {' '.join(str(error).split())}"
        ) from error

    return model


def _require_causal(file: Path, config: PreTrainedConfig) -> None:
    """Refuse another kind of model, and a config that does not say which."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None:
        raise ConfigError(
            f"{file}: model_type {config.model_type} is no causal language "
            "model; a student must be one"
        )

    if config.architectures != [family.__name__]:
        named = config.architectures or ["none"]
        named = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
        raise ConfigError(
            f"{file}: architectures is {named}; a student of model_type {config.model_type} "
            f"is trained as {family.__name__}: write architectures: [{family.__name__}] if "
            "that is what the weights are"
        )


def _rotary_embeddings(config: PreTrainedConfig) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Kind and parameters of every rotary embedding: some models have one for each type of
    layer.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [
        value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value
    ]
    for embedding in nested or [parameters]:
        yield str(embedding.get("rope_type", "default")), embedding


def _require_fixed_rotation(
    file: Path, kind: str, parameters: Mapping[str, object], num_tokens: int
) -> None:
    """Refuse an embedding that transformers changes with the longest sequence of a packed batch.

    vLLM decides once: LongRoPE takes its long factors if the longest sequence may be above the
    threshold, dynamic NTK is stretched at every length. So below the threshold LongRoPE is the same
    for both, and dynamic NTK never is.
    """
    if "dynamic" in kind:
        raise ConfigError(
            f"{file}: its rotary embedding ({kind}) depends on the length of the sequence in "
            "training and does not in vLLM, so that another model would be served than is "
            "trained; take a student without"
        )

    threshold = parameters.get("original_max_position_embeddings")
    if kind == "longrope" and isinstance(threshold, int) and num_tokens > threshold:
        raise ConfigError(
            f"{file}: its rotary embedding (longrope) changes above {threshold} tokens, in "
            "training by the length of the sequence and in vLLM for all; prompts.max_tokens "
            f"+ max_response_tokens is {num_tokens}, and may be {threshold} at most"
        )


def _require_writable(file: Path, config: PreTrainedConfig) -> None:
    """Write the config as the export at the end of the run will."""
    with TemporaryDirectory() as directory:
        try:
            config.save_pretrained(directory)
        except Exception as error:  # whatever the family's own checks raise
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{file}: transformers would not write it again for the trained student: {reason}"
            ) from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
