"""The student as a plain Hugging Face directory: from a live model, or from a checkpoint, which
needs no process group, no Ray and no GPU.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from eopd.config import StudentConfig
from eopd.hub import model_directory
from eopd.learner.deepspeed_backend import read_weights
from eopd.learner.lora import adapter_tensors, save_adapter, whole_tensors
from eopd.learner.student import load_student
from eopd.run.storage import replaced

# Files of a model directory that training does not change; they are copied byte by byte.
_GIVEN = (
    GENERATION_CONFIG_NAME,
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def export_checkpoint(
    student: StudentConfig, checkpoint: Path, directory: Path, note: Callable[[str], None]
) -> None:
    """Write the student as it was when ``LearnerRank.save`` wrote ``checkpoint``; bit-equal to an
    export at that time.

    Args:
        student: the run's, whose ``model`` gives architecture and tokenizer.
        checkpoint: the learner's part of a checkpoint, of any ZeRO stage and number of ranks.
        directory: where to write; an older one is replaced. With LoRA it holds the merged model, and
            the adapter is written to ``<directory>-adapter``, which is replaced too.
        note: is told where the adapter is left out, since it does not fit the model any more that it
            would name.
    """
    source = model_directory(student.model)
    loaded = load_student(student, activation_checkpointing=False)
    trained = read_weights(checkpoint)
    fits = all(
        torch.equal(parameter, trained[name].to(parameter.dtype))
        for name, parameter in loaded.named_parameters()
        if not parameter.requires_grad
    )
    loaded.load_state_dict(trained)
    model = loaded.model
    weights = {name: recipe.whole() for name, recipe in whole_tensors(model).items()}
    write_student(directory, model, weights, source=source)
    if adapter := {name: recipe.whole() for name, recipe in adapter_tensors(model).items()}:
        if fits:
            place = directory.with_name(f"{directory.name}-adapter")
            save_adapter(place, model, adapter, source=source)
        else:
            note(f"the adapter is left out: {source} holds other weights than it was trained on")


def write_student(
    directory: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], *, source: Path
) -> None:
    """Write a Hugging Face directory, whole or not at all; replaces an older one.

    Args:
        directory: where to write.
        model: what the weights belong to; its own may be partitioned.
        weights: whole tensors by the model's names, on the CPU; of tied ones, any or all.
        source: the directory that was trained; its tokenizer and generation config go with it, as
            they are.
    """
    with replaced(directory) as partial:
        # its own may be one that transformers refuses to write
        model.generation_config = GenerationConfig()
        model.save_pretrained(partial, state_dict=dict(weights))
        (partial / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
        for file in partial.glob("*.safetensors"):
            shutil.copymode(partial / CONFIG_NAME, file)  # safetensors 0.8.0: for its owner alone

        _copy_given(source, partial)


def _copy_given(source: Path, directory: Path) -> None:
    """Copy generation config, tokenizer and chat templates as they were given.

    Raises:
        FileNotFoundError: there is nothing of the kind.
    """
    files = sorted(file for pattern in _GIVEN for file in source.glob(pattern) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{source}: holds no tokenizer for the exported student")

    for file in files:
        target = directory / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
