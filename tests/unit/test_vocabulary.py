"""Student and teacher must speak of the same tokens: real tokenizers, and directories with
one thing changed.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from eopd.config import ConfigError
from eopd.models.tiny import train_tokenizer
from eopd.teacher.vocabulary import require_same_vocabulary
from eopd.tokenizer import end_token_ids, load_tokenizer, num_tokens, vocab_size

TEXTS = ["The river runs past the old mill.", "Add 3 and 4: the answer is 7."]
SIZE = 280


def model_directory(
    path: Path,
    *,
    texts: list[str] = TEXTS,
    eos: str = "<|im_end|>",
    generation_eos: object = 2,
    rows: int = SIZE,
) -> Path:
    tokenizer = train_tokenizer(texts, SIZE)
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(path)
    config = {"model_type": "llama", "vocab_size": rows, "eos_token_id": 0}
    generation_config = {"eos_token_id": generation_eos}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(generation_config))
    return path


@pytest.fixture
def student(tmp_path):
    return model_directory(tmp_path / "student")


def test_equal_directories_pass(student, tmp_path):
    require_same_vocabulary(student, model_directory(tmp_path / "teacher"), {})


def test_a_student_with_spare_rows_passes(tmp_path):
    student = model_directory(tmp_path / "student", rows=SIZE + 40)
    shared = require_same_vocabulary(
        student,
        model_directory(tmp_path / "teacher", rows=SIZE + 8),
        {},
    )
    assert shared.num_ids == num_tokens(student) <= SIZE
    assert shared.notes == (
        f"the student's rows from {shared.num_ids} on are padding: never sampled, and left "
        "out of the loss",
        f"the teacher's rows from {shared.num_ids} on are padding: their probability counts "
        "as outside the top k",
    )


def test_a_teacher_s_spare_rows_are_padding_when_they_name_no_token(student, tmp_path):
    shared = require_same_vocabulary(
        student,
        model_directory(tmp_path / "teacher", rows=SIZE + 40),
        {},
    )
    assert shared.student_rows == SIZE
    assert shared.teacher_rows == SIZE + 40
    last = max(load_tokenizer(student).get_vocab().values())
    assert shared.num_tokens == num_tokens(student) == last + 1 <= SIZE


def test_a_token_that_only_the_teacher_s_head_has_is_named(tmp_path):
    student = model_directory(tmp_path / "student")
    last = num_tokens(student) - 1
    student = model_directory(tmp_path / "student", rows=last)
    token = load_tokenizer(student).convert_ids_to_tokens(last)
    with pytest.raises(ConfigError, match=rf"head of {SIZE} rows.* one of {last}") as refused:
        require_same_vocabulary(student, model_directory(tmp_path / "teacher"), {})

    assert f"token {last} {token!r}" in str(refused.value)
    shared = require_same_vocabulary(
        student,
        model_directory(tmp_path / "small", rows=last),
        {},
    )
    assert shared.num_ids == num_tokens(student) == last  # neither can name it


def test_a_token_that_only_the_student_s_head_has_is_named(student, tmp_path):
    last = num_tokens(student) - 1
    teacher = model_directory(tmp_path / "teacher", rows=last)
    token = load_tokenizer(student).convert_ids_to_tokens(last)

    message = rf"head of {SIZE} rows.* one of {last}: the student could write"
    with pytest.raises(ConfigError, match=message) as refused:
        require_same_vocabulary(student, teacher, {})

    assert f"token {last} {token!r}" in str(refused.value)


def test_the_first_differing_token_and_both_sizes_are_named(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher", texts=["zzz yyy zzz yyy zzz yyy"])
    own = load_tokenizer(student)
    theirs = load_tokenizer(teacher)
    assert "zz" in theirs.get_vocab() and "zz" not in own.get_vocab()
    # three special tokens and 256 bytes are the same everywhere, the first merge is not
    first = 259
    own_name = own.convert_ids_to_tokens(first)
    their_name = theirs.convert_ids_to_tokens(first)
    assert None not in (own_name, their_name)
    assert own_name != their_name
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher, {})

    message = str(refused.value)
    both = f"{own_name!r} for the student and {their_name!r} for the teacher"
    assert f"id {first} is {both}" in message
    assert f"({len(own.get_vocab())} and {len(theirs.get_vocab())} tokens)" in message


def test_an_added_token_counts(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher")
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(teacher)

    message = r"is no token for the student and '<think>' for the teacher"
    with pytest.raises(ConfigError, match=message):
        require_same_vocabulary(student, teacher, {})


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_tokens_that_only_one_has_are_named_and_can_be_padding(tmp_path, larger):
    pair = {
        name: model_directory(tmp_path / name, rows=SIZE + 40) for name in ("student", "teacher")
    }
    tokenizer = load_tokenizer(pair[larger])
    tokenizer.add_tokens([f"<{letter}>" for letter in "abcd"])
    tokenizer.save_pretrained(pair[larger])
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(pair["student"], pair["teacher"], {})

    last, (other,) = len(tokenizer), [name for name in pair if name != larger]
    names = ", ".join(f"{last - 4 + i} '<{letter}>'" for i, letter in enumerate("abc"))
    assert f"; only the {larger} has {names} and so on. If nothing needs" in str(refused.value)
    pair[larger] = shutil.copytree(pair[larger], tmp_path / "copy")
    for path in pair[other].glob("tokenizer*"):
        shutil.copy(path, pair[larger])

    shared = require_same_vocabulary(pair["student"], pair["teacher"], {})
    assert any(note.startswith(f"the {larger}'s rows from {last - 4} on") for note in shared.notes)


def test_equal_tokens_under_other_rules_are_refused(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher")
    path = teacher / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules))
    with pytest.raises(ConfigError, match="cut text differently"):
        require_same_vocabulary(student, teacher, {})


@pytest.mark.parametrize("adds", ["<|im_start|> $A", "$A <|im_end|>"])
def test_special_tokens_that_one_side_adds_of_itself_are_a_note(student, tmp_path, adds):
    teacher = model_directory(tmp_path / "teacher")
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    special = [(word, tokenizer.token_to_id(word)) for word in adds.split() if word != "$A"]
    tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=special)
    tokenizer.save(str(teacher / "tokenizer.json"))
    (note,) = require_same_vocabulary(student, teacher, {}).notes
    makes = f"the student's tokenizer makes 'a' and the teacher's {shown(adds)!r}"
    assert note.startswith(f"of the text 'a' {makes}, with")
    same = model_directory(tmp_path / "same")
    assert require_same_vocabulary(student, same, {}).notes == ()


def shown(adds: str) -> str:
    return adds.replace("$A", "a").replace(" ", "")


END, IM_START, IM_END = 0, 1, 2
NAMES = {END: "<|endoftext|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}


def ending(path: Path, *ids: int) -> Path:
    """A model whose tokenizer ends on the first id, and whose generation config names all."""
    return model_directory(path, eos=NAMES[ids[0]], generation_eos=list(ids))


@pytest.mark.parametrize(
    "changed",
    [
        {"eos": "<|endoftext|>", "generation_eos": 0},
        {"generation_eos": [0, 2]},
    ],
    ids=["another end token", "one more end token"],
)
def test_other_end_tokens_are_refused(student, tmp_path, changed):
    teacher = model_directory(tmp_path / "teacher", **changed)
    with pytest.raises(ConfigError, match=r"2 '<\|im_end\|>'.*0 '<\|endoftext\|>'"):
        require_same_vocabulary(student, teacher, {})


@pytest.mark.parametrize(
    ("own", "theirs", "remap"),
    [
        ((END,), (IM_END,), {END: IM_END}),
        ((END,), (IM_END, END), {END: IM_END}),  # Qwen3-Base and Qwen3
        ((END, IM_START), (IM_END, IM_START), {END: IM_END}),
        ((IM_START, END), (IM_START, IM_END), {END: IM_END}),
    ],
)
def test_the_remap_a_pair_needs_is_proposed_and_then_accepted(tmp_path, own, theirs, remap):
    student = ending(tmp_path / "student", *own)
    teacher = ending(tmp_path / "teacher", *theirs)
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher, {})

    message = str(refused.value)
    advice = "eos_remap: {0: 2}  # '<|endoftext|>' -> '<|im_end|>'"
    assert message.endswith(f"; write {advice}"), message
    assert yaml.safe_load(advice) == {"eos_remap": remap}
    shared = require_same_vocabulary(student, teacher, remap)
    assert shared.student_ends == {token_id: NAMES[token_id] for token_id in sorted(own)}
    assert shared.teacher_ends == {token_id: NAMES[token_id] for token_id in sorted(theirs)}


@pytest.mark.parametrize(
    ("own", "theirs", "advice"),
    [
        (
            (END,),
            (IM_END, IM_START, END),  # Llama-3.2 and its Instruct
            "add 1 '<|im_start|>' to eos_token_id in the student's generation_config.json, "
            "and write eos_remap: {0: 2}",
        ),
        (
            (IM_END,),
            (IM_END, END),
            "add 0 '<|endoftext|>' to eos_token_id in the student's generation_config.json",
        ),
        ((END, IM_END), (IM_END,), "take 0 '<|endoftext|>' out of eos_token_id"),
        ((END,), (IM_END, 9999), "9999 is no token of their tokenizer"),
    ],
)
def test_what_a_remap_alone_cannot_mend_is_said(tmp_path, own, theirs, advice):
    student = ending(tmp_path / "student", *own)
    teacher = ending(tmp_path / "teacher", *theirs)
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher, {})

    assert f"never stop; {advice}" in str(refused.value)


def test_an_end_token_that_was_guessed_is_said_to_be(tmp_path):
    student = ending(tmp_path / "student", IM_END)
    teacher = ending(tmp_path / "teacher", IM_END, END)
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher, {})

    assert "guessed" not in str(refused.value)
    (teacher / "tokenizer_config.json").unlink()
    load_tokenizer.cache_clear()
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher, {})

    told = f": first copy tokenizer_config.json into {teacher}, from where"
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("own", "theirs", "remap", "message"),
    [
        (
            (END,),
            (IM_END,),
            {IM_START: IM_END},
            "the student ends no response with 1, but with 0 '<|endoftext|>'",
        ),
        (
            (END,),
            (IM_END,),
            {END: IM_START},
            "the teacher ends no response with 1, but with 2 '<|im_end|>'",
        ),
        ((IM_END,), (IM_END,), {END: IM_END}, "the student ends no response with 0"),
        ((END, IM_END), (IM_END,), {END: IM_END}, "makes the student never stop"),  # two of one
        ((END, IM_START), (IM_END,), {END: IM_END}, "take 1 '<|im_start|>' out of"),
    ],
)
def test_a_wrong_remap_is_refused(tmp_path, own, theirs, remap, message):
    student = ending(tmp_path / "student", *own)
    teacher = ending(tmp_path / "teacher", *theirs)
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher, remap)

    assert message in str(refused.value)
    assert str(student) in str(refused.value)
    assert str(teacher) in str(refused.value)


def test_harmless_differences_are_notes(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher")
    assert require_same_vocabulary(student, teacher, {}).notes == ()
    other = model_directory(tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    path = other / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    assert require_same_vocabulary(student, other, {}).notes == (
        "chat templates differ; that of the student is the one that may render prompts",
        "pad_token is '<|endoftext|>' for the student and '<|im_end|>' for the teacher",
    )


def test_a_tokenizer_is_loaded_once(student):
    assert load_tokenizer(student) is load_tokenizer(student)


@pytest.mark.parametrize(
    ("eos", "generation_eos", "expected"),
    [
        ("<|im_end|>", 2, (2,)),
        ("<|im_end|>", [2, 0], (0, 2)),
        ("<|endoftext|>", 2, (0, 2)),
        ("<|im_end|>", None, (2,)),
    ],
)
def test_end_tokens_are_those_of_generation_config_and_tokenizer(
    tmp_path, eos, generation_eos, expected
):
    directory = model_directory(tmp_path / "m", eos=eos, generation_eos=generation_eos)
    assert end_token_ids(directory) == expected


def test_without_a_generation_config_the_config_counts(student):
    (student / "generation_config.json").unlink()
    assert end_token_ids(student) == (0, 2)


def test_a_model_that_never_ends_is_refused(tmp_path):
    directory = model_directory(tmp_path / "m", generation_eos=None)
    tokenizer = load_tokenizer(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(ConfigError, match="names an end token"):
        end_token_ids(directory)


def test_vocabulary_size_is_that_of_the_head(tmp_path):
    directory = model_directory(tmp_path / "m", rows=300)
    assert vocab_size(directory) == 300
    (directory / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 301}}))
    assert vocab_size(directory) == 301
    (directory / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="vocab_size"):
        vocab_size(directory)


def test_missing_files_are_one_clear_message(student, tmp_path):
    with pytest.raises(ConfigError, match="no such model directory"):
        load_tokenizer(tmp_path / "absent")

    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "empty")

    (student / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        vocab_size(student)
