"""Model directories are opened before a worker does, to find what is missing, broken, or misfits."""

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from eopd.config import ConfigError
from eopd.config.json_text import told
from eopd.config.pointer import require_no_pointer
from eopd.preflight.declared import source_of
from eopd.preflight.weights import TensorInfo, are_equal, read_tensors
from eopd.tokenizer import end_token_ids, load_tokenizer, read_json, vocab_size

# The files that a run reads of a model directory, without the weights.
_READ: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "*tokens*.json",
    "chat_template*",
)

# The lists of vLLM's registry (0.32.0) whose models compute logits over a vocabulary.
_LOGIT_MODELS: Final = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
)


def require_model(
    key: str, directory: Path, *, num_tokens: int, weights: bool = True, tokenizer: bool = True
) -> None:
    """Opens everything in a model directory that a run will read.

    Args:
        key: the config key of the directory; every message begins with it.
        directory: a Hugging Face model directory.
        num_tokens: the longest sequence that the model must take.
        weights: false where they are elsewhere, behind a server.
        tokenizer: false where only token ids come and go, in a server.

    Raises:
        ConfigError: something is missing or cannot be read, or the model has too few positions.
    """
    with _blame(key):
        _require_directory(directory)
        files = (file for pattern in _READ for file in directory.glob(pattern))
        for file in sorted(filter(Path.is_file, files)):
            require_no_pointer(file)

        config = read_json(directory / "config.json")
        if not isinstance(kind := config.get("model_type", ""), str | None):
            raise ConfigError(
                f"{directory / 'config.json'}: model_type must be a name, is {told(kind)}"
            )

        positions = config.get("max_position_embeddings")
        if isinstance(positions, int) and num_tokens > positions:
            raise ConfigError(
                f"{directory} has {positions} positions; prompts.max_tokens + "
                f"max_response_tokens is {num_tokens}"
            )

        vocab_size(directory)
        if weights:
            tensors = read_tensors(directory, standard_names=False)
            _require_plain(directory, tensors or {})

    if tokenizer:
        with _blame(key), quiet():
            load_tokenizer(directory)
            end_token_ids(directory)
            _require_generation_config(directory)


def require_student(directory: Path, *, num_tokens: int, weights: bool = True) -> None:
    """Checks on a model without weights that the learner can train ``student.model``.

    Args:
        directory: the student's.
        num_tokens: the longest sequence of the run.
        weights: false where they are not here, so that only their shapes can be checked.

    Raises:
        ConfigError: it cannot, for a reason of ``eopd.learner.fitness``, or since tied weights differ.
    """
    key = "student.model"
    with _blame(key):
        tensors = read_tensors(directory, standard_names=True) if weights else None

    with _blame(key), quiet():
        from eopd.learner.fitness import check_student, check_weights

        model = check_student(directory, num_tokens=num_tokens)
        if tensors is not None:
            check_weights(model, directory, {name: one.shape for name, one in tensors.items()})
            _require_tied(directory, model.all_tied_weights_keys, tensors)


def require_heads(key: str, directory: Path, vllm: Mapping[str, object]) -> None:
    """Checks that the workers of an engine can share the heads of a model's attention.

    Each worker has as many of the query heads (``ModelConfig.verify_with_parallel_config`` of vLLM
    0.32.0), and as many key-value heads, or one that it shares with others (``Qwen3Attention``).

    Args:
        key: the key of the engine's options of vLLM.
        directory: the model's.
        vllm: the options.

    Raises:
        ConfigError: the number of workers does not divide them.
    """
    described = read_json(directory / "config.json")
    nested = described.get("text_config")
    described |= nested if isinstance(nested, dict) else {}
    heads = described.get("num_attention_heads")
    shared = described.get("num_key_value_heads") or heads
    workers = vllm.get("tensor_parallel_size", 1)
    if not (isinstance(heads, int) and isinstance(shared, int) and isinstance(workers, int)):
        return

    fault = f"{key}.tensor_parallel_size: {workers} workers cannot share the"
    if heads % workers:
        raise ConfigError(f"{fault} {heads} attention heads of {directory}")

    if max(shared, workers) % min(shared, workers):
        raise ConfigError(f"{fault} {shared} key-value heads of {directory}")


def require_top_k(top_k: int, model: str, directory: Path) -> None:
    """Checks that a model, in a directory, has as many tokens as ``loss.top_k`` asks for.

    Raises:
        ConfigError: it has fewer.
    """
    if top_k > (rows := vocab_size(directory)):
        raise ConfigError(
            f"loss.top_k: {top_k} is larger than the vocabulary of {rows} tokens of {model}"
        )


def require_served(key: str, directory: Path) -> None:
    """Checks that the installed vLLM has a teacher's architecture. It is looked up in the source of
    vLLM, since an import takes seconds.

    Raises:
        ConfigError: the model names no architecture, or none that computes logits in vLLM.
    """
    named = read_json(directory / "config.json").get("architectures")
    if not isinstance(named, list) or not named:
        raise ConfigError(
            f"{key}: {directory / 'config.json'} names no architectures, by "
            "which vLLM would load it"
        )

    if not isinstance(named[0], str):
        raise ConfigError(
            f"{key}: {directory / 'config.json'}: architectures must be names, has {told(named[0])}"
        )

    known = _vllm_architectures()
    if known and named[0] not in known:
        raise ConfigError(
            f"{key}: {directory / 'config.json'} names architecture {named[0]}; the "
            "installed vLLM knows no language model of that name, which a teacher must be"
        )


def _vllm_architectures() -> frozenset[str]:
    """Returns the names of vLLM's models that compute logits; none where it is not installed."""
    root = source_of("vllm")
    if root is None:
        return frozenset()

    source = root / "model_executor" / "models" / "registry.py"
    lists = [
        node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id in _LOGIT_MODELS
    ]
    keys = [name for models in lists for name in models.keys if isinstance(name, ast.Constant)]

    return frozenset(str(name.value) for name in keys)


def _require_plain(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses what would be loaded as another model than it looks like."""
    if (directory / "adapter_config.json").exists():
        raise ConfigError(
            f"{directory} holds adapter_config.json beside the weights: transformers would lay that "
            "adapter over them, and vLLM would not; merge it into them, or move it away"
        )

    formats = {tensor.dtype for tensor in tensors.values()}
    if formats and not any(name.startswith(("F", "BF")) for name in formats):
        raise ConfigError(
            f"{directory}: its weights are whole numbers ({', '.join(sorted(formats))}), which "
            "no model computes with"
        )


def _require_tied(
    directory: Path, source_of: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    """Refuses tied weights that are stored twice, and differently."""
    for tied, source in source_of.items():
        if tied in tensors and source in tensors and not are_equal(tensors, tied, source):
            raise ConfigError(
                f"{directory}: config.json ties {tied} to {source} (tie_word_embeddings), and "
                "the weights hold two different tensors: vLLM would serve another model "
                "than is trained; write tie_word_embeddings: false in config.json, or take "
                f"{tied} out of the weights"
            )


def _require_directory(directory: Path) -> None:
    """Refuses what is no directory, and says what else may stand there."""
    if not directory.exists():
        raise ConfigError(
            f"there is no directory {directory}; a model on the Hugging Face Hub is named "
            "OWNER/NAME or OWNER/NAME@REVISION, `eopd models demo` and `eopd models tiny` make "
            "those of the shipped configs"
        )

    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is a file; name the Hugging Face model directory that holds it"
        )

    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory} is an adapter alone; merge it into its model, and name that directory"
        )

    if not (directory / "config.json").is_file():
        hint = ""
        if (directory / "config.yaml").is_file():
            hint = (
                f"; it is a run: its student is {directory / 'hf'}, which `eopd export` writes too"
            )

        raise ConfigError(
            f"{directory} is no Hugging Face model directory (it has no config.json){hint}"
        )


def _require_generation_config(directory: Path) -> None:
    """Reads ``generation_config.json`` as the learner and every engine will."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if not (directory / GENERATION_CONFIG_NAME).exists():
        return

    try:
        GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever its own checks raise
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{directory / GENERATION_CONFIG_NAME}: transformers cannot read it: {reason}"
        ) from error


@contextmanager
def _blame(key: str) -> Iterator[None]:
    """Begins the message of every error with the config key that the user has to look at."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename} cannot be read ({error.strerror})") from error
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from warnings and progress bars while the block runs; exceptions pass."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()

    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
