"""Do student and teacher speak of the same tokens? Checked from their directories, before anything
starts.

The loss compares probabilities id by id, so every id must mean the same token on both sides, every
token a teacher can name must have a row in the student's head, and both must end a response with
the same tokens, once the teacher's ``eos_remap`` is applied. Left out: bringing together tokenizers
that differ in anything else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from eopd.config import ConfigError
from eopd.tokenizer import end_token_ids, load_tokenizer, vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN: Final = 3
# Scripts, digits, spaces and markup on which tokenizers of equal vocabulary but other rules part
# ways.
_PROBE = (
    "  It's 3.14159 = \u03c0,\n\tna\u00efve \u4f60\u597d "
    "\u041f\u0440\u0438\u0432\u0435\u0442 def f(x):"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedVocabulary:
    """What a student and a teacher that can be compared have in common, and what a user may want to
    know of it.

    ``num_ids`` is one above the highest token that both heads have: what the student's distribution
    is over. ``notes`` are differences that do no harm.
    """

    num_tokens: int
    num_ids: int
    student_rows: int
    teacher_rows: int
    student_ends: Mapping[int, str]
    teacher_ends: Mapping[int, str]
    notes: tuple[str, ...]


def require_same_vocabulary(
    student: Path, teacher: Path, remap: Mapping[int, int]
) -> SharedVocabulary:
    """Refuse a pair whose token ids cannot be compared.

    Equal tokenizers are required, equally sized heads are not, as long as both have the same
    tokens: a student's spare rows are left out of sampling and of the loss, a teacher's count as
    tail. Once ``remap`` (student end id to teacher end id) is applied, both must end a response on
    the same tokens.

    Raises:
        ConfigError: one message, naming the first token that differs, or the first that one of the
            heads lacks, or the two sets of end tokens and what to write to bring them together.
    """
    tokenizers = load_tokenizer(student), load_tokenizer(teacher)
    vocabularies = tokenizers[0].get_vocab(), tokenizers[1].get_vocab()
    _require_same_tokens(student, vocabularies[0], teacher, vocabularies[1])
    encoded = [tokenizer.encode(_PROBE, add_special_tokens=False) for tokenizer in tokenizers]
    if encoded[0] != encoded[1]:
        raise ConfigError(
            f"student {student} and teacher {teacher} have the same tokens but cut text "
            f"differently: {_PROBE!r} becomes {encoded[0]} for the student and {encoded[1]} "
            "for the teacher"
        )

    names = {token_id: token for token, token_id in vocabularies[0].items()}
    rows = vocab_size(student), vocab_size(teacher)
    _require_heads(names, rows, student, teacher)
    student_ends = {token_id: names.get(token_id, "") for token_id in end_token_ids(student)}
    teacher_ends = {token_id: names.get(token_id, "") for token_id in end_token_ids(teacher)}

    try:
        _require_same_ends(
            student_ends,
            teacher_ends,
            remap,
            usual=(tokenizers[0].eos_token_id, tokenizers[1].eos_token_id),
        )
    except ConfigError as error:
        told = f"student {student}, teacher {teacher}: {_guessed(student, teacher)}{error}"
        raise ConfigError(told) from None

    num_ids = min(1 + max(names), *rows)

    return SharedVocabulary(
        num_tokens=len(names),
        num_ids=num_ids,
        student_rows=rows[0],
        teacher_rows=rows[1],
        student_ends=student_ends,
        teacher_ends=teacher_ends,
        notes=(*_padding(num_ids, *rows), *_harmless(*tokenizers)),
    )


def _guessed(*directories: Path) -> str:
    """Returns a remark on end tokens, where a tokenizer does not name its own: transformers then takes
    that of its family.
    """
    lacking = [str(path) for path in directories if not (path / "tokenizer_config.json").is_file()]
    if not lacking:
        return ""

    return (
        f"first copy tokenizer_config.json into {' and '.join(lacking)}, from where the model came: "
        "without it an end token was guessed; as it is, "
    )


def _require_heads(
    names: Mapping[int, str], rows: tuple[int, int], student: Path, teacher: Path
) -> None:
    """Refuse a pair of which one could name a token that the other one's head lacks."""
    if missing := sorted(token_id for token_id in names if rows[0] <= token_id < rows[1]):
        raise ConfigError(
            f"teacher {teacher} has a head of {rows[1]} rows, student {student} one of "
            f"{rows[0]}: the teacher's top k could name token {missing[0]} "
            f"{names[missing[0]]!r}, which the student does not have; pad its head"
        )

    if missing := sorted(token_id for token_id in names if rows[1] <= token_id < rows[0]):
        raise ConfigError(
            f"student {student} has a head of {rows[0]} rows, teacher {teacher} one of "
            f"{rows[1]}: the student could write token {missing[0]} {names[missing[0]]!r}, "
            "which the teacher does not have; pad its head"
        )


def _padding(num_ids: int, student_rows: int, teacher_rows: int) -> Iterator[str]:
    """Yields what becomes of rows that name no token."""
    if student_rows > num_ids:
        yield (
            f"the student's rows from {num_ids} on are padding: never sampled, and left out "
            "of the loss"
        )

    if teacher_rows > num_ids:
        yield (
            f"the teacher's rows from {num_ids} on are padding: their probability counts as "
            "outside the top k"
        )


def _harmless(
    student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase"
) -> Iterator[str]:
    """Differences that do not matter, since only the student's tokenizer is used."""
    whole = [tokenizer.decode(tokenizer.encode("a")) for tokenizer in (student, teacher)]
    if whole[0] != whole[1]:
        yield (
            f"of the text 'a' the student's tokenizer makes {whole[0]!r} and the teacher's "
            f"{whole[1]!r}, with the special tokens that each adds of itself; prompts are "
            "tokenised with the student's"
        )

    if student.chat_template != teacher.chat_template:
        yield "chat templates differ; that of the student is the one that may render prompts"

    roles = student.special_tokens_map, teacher.special_tokens_map
    for role in sorted(roles[0].keys() | roles[1].keys()):
        if role != "eos_token" and (names := [tokens.get(role) for tokens in roles])[0] != names[1]:
            yield f"{role} is {names[0]!r} for the student and {names[1]!r} for the teacher"


Ends = Mapping[int, str]  # ids that end a response, and their tokens


def _require_same_ends(
    own: Ends, theirs: Ends, remap: Mapping[int, int], *, usual: tuple[object, object]
) -> None:
    """Refuse end tokens that ``remap`` does not bring together.

    Args:
        own: the student's.
        theirs: the teacher's.
        remap: student id to teacher id.
        usual: the end tokens of the two tokenizers, the likeliest to be a pair.
    """
    for who, ends, named in (("student", own, remap.keys()), ("teacher", theirs, remap.values())):
        if strangers := [token_id for token_id in named if token_id not in ends]:
            raise ConfigError(
                f"eos_remap: the {who} ends no response with {strangers[0]}, "
                f"but with {_listed(ends)}"
            )

    if not _agree(own, theirs, remap):
        raise ConfigError(
            f"the student ends a response with {_listed(own)}, the teacher with "
            f"{_listed(theirs)}: such a teacher makes the student never stop; "
            f"{_advice(own, theirs, usual)}"
        )


def _agree(own: Ends, theirs: Ends, remap: Mapping[int, int]) -> bool:
    """Returns whether every end token of either side is one of the other's, no two the same."""
    there = [remap.get(token_id, token_id) for token_id in own]
    return not any(_lonely(own, theirs, remap)) and len(set(there)) == len(there)


def _lonely(own: Ends, theirs: Ends, remap: Mapping[int, int]) -> tuple[Ends, Ends]:
    """End tokens of the student, and of the teacher, that end nothing on the other side."""
    back = {there: here for here, there in remap.items()}
    return (
        {
            token_id: token
            for token_id, token in own.items()
            if remap.get(token_id, token_id) not in theirs
        },
        {
            token_id: token
            for token_id, token in theirs.items()
            if back.get(token_id, token_id) not in own
        },
    )


def _advice(own: Ends, theirs: Ends, usual: tuple[object, object]) -> str:
    """Returns what to write so that the two agree; the remap, where one helps, last and as YAML."""
    if nameless := [
        token_id for ends in (own, theirs) for token_id, token in ends.items() if not token
    ]:
        return (
            f"{nameless[0]} is no token of their tokenizer; mend eos_token_id in "
            "generation_config.json"
        )

    alone = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
    pairs = [(alone[0][0], alone[1][0])] if len(alone[0]) == len(alone[1]) == 1 else []
    pairs += [(a, b) for a in own for b in alone[1] if (a, b) == usual]
    remap = next(
        (dict([pair]) for pair in pairs if _agree(own, theirs, dict([pair]))), dict(pairs[:1])
    )
    spare, missing = (_listed(ends) for ends in _lonely(own, theirs, remap))
    steps = [
        f"take {spare} out of eos_token_id in the student's generation config and tokenizer"
        if spare
        else "",
        f"add {missing} to eos_token_id in the student's generation_config.json" if missing else "",
        *(
            f"write eos_remap: {{{a}: {b}}}  # {own[a]!r} -> {theirs[b]!r}"
            for a, b in remap.items()
        ),
    ]

    return ", and ".join(step for step in steps if step)


def _listed(ends: Ends) -> str:
    """``151643 '<|endoftext|>', 151645 '<|im_end|>'``."""
    return ", ".join(f"{token_id} {token!r}" for token_id, token in ends.items())


def _require_same_tokens(
    student: Path, student_ids: dict[str, int], teacher: Path, teacher_ids: dict[str, int]
) -> None:
    """Compare two maps of token to id, and name the lowest id on which they differ."""
    if student_ids == teacher_ids:
        return

    student_tokens = {token_id: token for token, token_id in student_ids.items()}
    teacher_tokens = {token_id: token for token, token_id in teacher_ids.items()}
    by_id = (student_tokens, teacher_tokens)
    first = min(i for i in by_id[0].keys() | by_id[1].keys() if by_id[0].get(i) != by_id[1].get(i))
    told = [repr(tokens[first]) if first in tokens else "no token" for tokens in by_id]
    raise ConfigError(
        f"student {student} and teacher {teacher} have different vocabularies "
        f"({len(student_ids)} and {len(teacher_ids)} tokens): id {first} is {told[0]} for "
        f"the student and {told[1]} for the teacher{_spare(student_ids, teacher_ids)}"
    )


def _spare(student_ids: Mapping[str, int], teacher_ids: Mapping[str, int]) -> str:
    """Returns what only one of two vocabularies has, and what to do; nothing where each has some."""
    own, theirs = (
        student_ids.items() - teacher_ids.items(),
        teacher_ids.items() - student_ids.items(),
    )
    if own and theirs:
        return ""

    more, other = ("student", "teacher") if own else ("teacher", "student")
    spare = sorted((token_id, token) for token, token_id in own or theirs)
    some = _listed(dict(spare[:_SHOWN])) + (" and so on" if len(spare) > _SHOWN else "")
    return (
        f"; only the {more} has {some}. If nothing needs them, train with a copy of the {more} that "
        f"has the tokenizer files of the {other}: its rows of them are padding then"
    )
