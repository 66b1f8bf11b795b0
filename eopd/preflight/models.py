"""Model directories, opened before a worker does: what is missing, and what does not fit."""

import json
from pathlib import Path

from eopd.config import ConfigError


def require_model(key: str, directory: Path, *, num_tokens: int, weights: bool = True) -> None:
    """A model directory with configuration, and ``weights`` unless they are elsewhere, for sequences of ``num_tokens``.

    Raises:
        ConfigError: something is missing, or the model's positions do not reach that far.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{key}: {directory} is no Hugging Face model directory (it has no config.json); "
            "`eopd models --help` makes the ones the shipped configs use"
        )
    if weights and not any(file for pattern in ("*.safetensors", "*.bin") for file in directory.glob(pattern)):
        raise ConfigError(f"{key}: {directory} has no weights (*.safetensors or *.bin)")
    positions = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    if positions is not None and num_tokens > positions:
        raise ConfigError(
            f"{key}: {directory} has {positions} positions; prompts.max_tokens + max_response_tokens is {num_tokens}"
        )
