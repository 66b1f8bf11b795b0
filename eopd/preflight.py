"""What is checked before any worker starts: models, vocabularies, prompts. Every failure is one ``ConfigError``."""

import json
from dataclasses import dataclass
from pathlib import Path

from eopd.config import Config, ConfigError
from eopd.prompts import PromptSet
from eopd.teacher.vocabulary import load_tokenizer, require_same_vocabulary, vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The checked inputs of a run."""

    train: PromptSet
    held_out: PromptSet


def check(config: Config) -> Prepared:
    """Check a run's inputs and load its prompts.

    Raises:
        ConfigError: a model directory or data file is missing, vocabularies differ, top_k is larger than the
        vocabulary, the student has no such layers to adapt, prompts do not fit, or a verifier has no answers.
    """
    require_model("student.model", config.student.model, num_tokens=config.max_sequence_tokens)
    for teacher in config.teachers:
        require_model(f"teachers.{teacher.name}.model", teacher.model, num_tokens=config.max_sequence_tokens)
        require_same_vocabulary(config.student.model, teacher.model)
    size = vocab_size(config.student.model)
    if config.loss.top_k > size:
        raise ConfigError(f"loss.top_k: {config.loss.top_k} is larger than the vocabulary of {size} tokens")
    if config.student.lora is not None:
        from eopd.learner.lora import check_targets

        check_targets(config.student.model, config.student.lora)
    tokenizer = load_tokenizer(config.student.model)
    train = PromptSet.load(config.prompts.data, config.prompts, tokenizer)
    if config.loss.reward is not None:
        require_answers(config.prompts.data, train)
    return Prepared(
        train=train,
        held_out=PromptSet.load(config.prompts.held_out, config.prompts, tokenizer),
    )


def require_answers(where: str, data: PromptSet) -> None:
    """Every prompt must have a reference answer.

    Raises:
        ConfigError: names prompts without.
    """
    if unanswered := [prompt.prompt_id for prompt in data.prompts if prompt.reference_answer is None]:
        raise ConfigError(f"{where}: rows without an answer cannot be graded: {unanswered[:5]}")


def require_model(key: str, directory: Path, *, num_tokens: int) -> None:
    """A model directory with configuration and weights, for sequences of ``num_tokens``.

    Raises:
        ConfigError: something is missing, or the model's positions do not reach that far.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{key}: {directory} is no Hugging Face model directory (it has no config.json); "
            "`eopd models --help` makes the ones the shipped configs use"
        )
    if not any(weights for pattern in ("*.safetensors", "*.bin") for weights in directory.glob(pattern)):
        raise ConfigError(f"{key}: {directory} has no weights (*.safetensors or *.bin)")
    positions = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    if positions is not None and num_tokens > positions:
        raise ConfigError(
            f"{key}: {directory} has {positions} positions; prompts.max_tokens + max_response_tokens is {num_tokens}"
        )
