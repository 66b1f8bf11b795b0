"""Do student and teacher speak of the same tokens? Checked from their directories, before anything starts.

The loss compares probabilities id by id, so every id must mean the same token on both sides, every id a teacher can
name must have a row in the student's head, and both must end a response with the same token. Only transformers'
tokenizers are loaded, and only when a function is called.
Left out: mapping one end token to the other; a pair that would need it is refused.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Scripts, digits, spaces and markup on which tokenizers of equal vocabulary but other rules part ways.
_PROBE = "  It's 3.14159 = \u03c0,\n\tna\u00efve \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 def f(x):"


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face directory; never looks anything up on the network.

    Raises:
        ConfigError: there is no such directory, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such model directory")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{directory}: its tokenizer cannot be loaded: {reason}") from error


def vocab_size(directory: Path) -> int:
    """Rows of the model's head, padding included: ``vocab_size`` of ``config.json``.

    Raises:
        ConfigError: the file or the key is missing.
    """
    config = _read_json(directory / "config.json")
    size = config.get("vocab_size", _mapping(config.get("text_config")).get("vocab_size"))
    if not isinstance(size, int):
        raise ConfigError(f"{directory / 'config.json'}: names no vocab_size")
    return size


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """The ids on which responses of this model end, ascending: those of ``generation_config.json`` (of
    ``config.json`` where a model has no generation config), and the tokenizer's end token.

    Raises:
        ConfigError: there is none, so that no response would ever end.
    """
    path = directory / "generation_config.json"
    named = _read_json(path if path.is_file() else directory / "config.json").get("eos_token_id")
    ids = set(named if isinstance(named, list) else [named])
    ids.add(load_tokenizer(directory).eos_token_id)
    found = sorted(token for token in ids if isinstance(token, int))
    if not found:
        raise ConfigError(f"{directory}: neither generation_config.json nor the tokenizer names an end token")
    return tuple(found)


def require_same_vocabulary(student: Path, teacher: Path) -> None:
    """Refuse a pair whose token ids cannot be compared.

    Equal tokenizers are required, equally sized heads are not: heads are padded, and a student's spare rows do no
    harm. A teacher's spare rows would, since its top k could name an id that the student's head lacks.

    Raises:
        ConfigError: one message, naming the first token that differs, or the two sizes, or the two sets of end tokens.
    """
    student_tokenizer, teacher_tokenizer = load_tokenizer(student), load_tokenizer(teacher)
    _require_same_tokens(student, student_tokenizer.get_vocab(), teacher, teacher_tokenizer.get_vocab())
    encoded = student_tokenizer(_PROBE)["input_ids"], teacher_tokenizer(_PROBE)["input_ids"]
    if encoded[0] != encoded[1]:
        raise ConfigError(
            f"student {student} and teacher {teacher} have the same tokens but cut text differently: {_PROBE!r} "
            f"becomes {encoded[0]} for the student and {encoded[1]} for the teacher"
        )
    sizes = vocab_size(student), vocab_size(teacher)
    if sizes[1] > sizes[0]:
        raise ConfigError(
            f"teacher {teacher} has a head of {sizes[1]} rows, student {student} one of {sizes[0]}: the teacher's top "
            "k could name a token the student does not have; pad the student's head"
        )
    ends = end_token_ids(student), end_token_ids(teacher)
    if ends[0] != ends[1]:
        names = [_ids_and_tokens(ids, student_tokenizer.convert_ids_to_tokens(list(ids))) for ids in ends]
        raise ConfigError(
            f"student {student} ends a response with {names[0]}, teacher {teacher} with {names[1]}: such a teacher "
            "makes the student never stop; make eos_token_id equal in both generation configs and tokenizers"
        )


def _ids_and_tokens(ids: tuple[int, ...], tokens: list[str]) -> str:
    """``151643 '<|endoftext|>', 151645 '<|im_end|>'``."""
    return ", ".join(f"{token_id} {token!r}" for token_id, token in zip(ids, tokens, strict=True))


def _require_same_tokens(
    student: Path, student_ids: dict[str, int], teacher: Path, teacher_ids: dict[str, int]
) -> None:
    """Compare two maps of token to id, and name the lowest id on which they differ."""
    if student_ids == teacher_ids:
        return
    by_id = [{token_id: token for token, token_id in ids.items()} for ids in (student_ids, teacher_ids)]
    first = min(i for i in by_id[0].keys() | by_id[1].keys() if by_id[0].get(i) != by_id[1].get(i))
    told = [repr(tokens[first]) if first in tokens else "no token" for tokens in by_id]
    raise ConfigError(
        f"student {student} and teacher {teacher} have different vocabularies ({len(student_ids)} and "
        f"{len(teacher_ids)} tokens): id {first} is {told[0]} for the student and {told[1]} for the teacher"
    )


def _read_json(path: Path) -> dict[str, object]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
