"""A Hugging Face directory has a tokenizer, a number of rows in the model's head, and end tokens.

Only transformers' tokenizers are loaded, when a function is called, and once a process; nothing is
looked up on the network.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from eopd.config import ConfigError
from eopd.config.json_text import JsonError, parse_json, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these transformers (5.19) makes up an empty tokenizer for some families.
_VOCABULARY_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*", "tekken.json")
_TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@cache
def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a Hugging Face directory, once a process; nothing is looked up on the
    network.

    Raises:
        ConfigError: there is no such directory, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such model directory")

    if not has_tokenizer(directory):
        raise ConfigError(f"{directory}: has no tokenizer ({', '.join(_VOCABULARY_FILES)})")

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # `tokenizers` raises bare ones, of a file that a newer release wrote
        _blame_a_file(directory, error)
        reason = " ".join(str(error).split())
        raise ConfigError(f"{directory}: its tokenizer cannot be loaded: {reason}") from error


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds the vocabulary of a tokenizer."""
    return any(file for pattern in _VOCABULARY_FILES for file in directory.glob(pattern))


def vocab_size(directory: Path) -> int:
    """Returns the rows of the model's head, padding included: ``vocab_size`` of ``config.json``.

    Raises:
        ConfigError: the file or the key is missing, or its value is no number of rows.
    """
    config = read_json(directory / "config.json")
    size = config.get("vocab_size", _mapping(config.get("text_config")).get("vocab_size"))
    if size is None:
        raise ConfigError(f"{directory / 'config.json'}: names no vocab_size")

    if not _is_whole(size) or size < 1:
        raise ConfigError(
            f"{directory / 'config.json'}: vocab_size must be a whole number of 1 or more, "
            f"is {told(size)}"
        )

    return size


def num_tokens(directory: Path) -> int:
    """Returns one more than the highest id that names a token and has a row in the head; the rows from
    there on are padding.

    Raises:
        ConfigError: there is no tokenizer, or no ``vocab_size``.
    """
    ids: dict[str, int] = load_tokenizer(directory).get_vocab()
    return min(1 + max(ids.values()), vocab_size(directory))


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """Returns the ids on which responses of this model end, ascending: those of
    ``generation_config.json`` (of ``config.json`` where a model has no generation config), and the
    tokenizer's end token.

    Raises:
        ConfigError: there is none, so that no response would ever end, or one is no id.
    """
    path = directory / "generation_config.json"
    path = path if path.is_file() else directory / "config.json"
    value = read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [token for token in ids if not _is_whole(token)]:
        raise ConfigError(
            f"{path}: eos_token_id must be the id of a token or a list of ids, has {told(wrong[0])}"
        )

    own = load_tokenizer(directory).eos_token_id
    ends = sorted({token for token in (*ids, own) if _is_whole(token)})
    if not ends:
        raise ConfigError(
            f"{directory}: neither generation_config.json nor the tokenizer names an end token"
        )

    return tuple(ends)


def read_json(path: Path) -> dict[str, object]:
    """Reads the object in a JSON file of a model directory.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    try:
        tree = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except JsonError as error:
        raise ConfigError(f"{path}: {error}") from None

    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a JSON object, is {told(tree)}")

    return tree


def _blame_a_file(directory: Path, error: Exception) -> None:
    """Raises the error of the file that kept a tokenizer from being loaded, if there is one.

    Raises:
        ConfigError: a file is no JSON, or it is ``config.json`` that transformers cannot read.
    """
    from transformers import AutoConfig

    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            read_json(directory / name)

    try:
        AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as first:  # whatever the family's own checks raise
        reason = " ".join(str(first).split())
        if str(first) != str(error):
            return

        raise ConfigError(
            f"{directory / 'config.json'}: transformers cannot read it: {reason}"
        ) from first


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
