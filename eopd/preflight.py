"""What is checked before any worker starts: models, vocabularies, prompts. Every failure is one ``ConfigError``."""

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
        vocabulary, or prompts do not fit.
    """
    _require_model("student.model", config.student.model)
    _require_model(f"teachers.{config.teacher.name}.model", config.teacher.model)
    require_same_vocabulary(config.student.model, config.teacher.model)
    size = vocab_size(config.student.model)
    if config.loss.top_k > size:
        raise ConfigError(f"loss.top_k: {config.loss.top_k} is larger than the vocabulary of {size} tokens")
    tokenizer = load_tokenizer(config.student.model)
    if config.prompts.template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"prompts.template: chat, but the tokenizer of {config.student.model} has no chat template; set it to none"
        )
    return Prepared(
        train=PromptSet.load(config.prompts.data, config.prompts, tokenizer),
        held_out=PromptSet.load(config.prompts.held_out, config.prompts, tokenizer),
    )


def _require_model(key: str, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{key}: {directory} is no Hugging Face model directory (it has no config.json); "
            "`eopd models --help` makes the ones the shipped configs use"
        )
