"""Student and teacher must speak of the same tokens: real tokenizers, and directories with one thing changed."""

import json
from pathlib import Path

import pytest

from eopd.config import ConfigError
from eopd.models.tiny import train_tokenizer
from eopd.teacher.vocabulary import end_token_ids, load_tokenizer, require_same_vocabulary, vocab_size

TEXTS = ["The river runs past the old mill.", "Add 3 and 4: the answer is 7."]
SIZE = 280


def model_directory(
    path: Path, *, texts: list[str] = TEXTS, eos: str = "<|im_end|>", generation_eos: object = 2, rows: int = SIZE
) -> Path:
    tokenizer = train_tokenizer(texts, SIZE)
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows, "eos_token_id": 0}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    return path


@pytest.fixture
def student(tmp_path):
    return model_directory(tmp_path / "student")


def test_equal_directories_pass(student, tmp_path):
    require_same_vocabulary(student, model_directory(tmp_path / "teacher"))


def test_a_student_with_spare_rows_passes(tmp_path):
    student = model_directory(tmp_path / "student", rows=SIZE + 40)
    require_same_vocabulary(student, model_directory(tmp_path / "teacher"))


def test_a_teacher_with_spare_rows_is_refused(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher", rows=SIZE + 40)
    with pytest.raises(ConfigError, match=rf"{SIZE + 40} rows.*{SIZE}"):
        require_same_vocabulary(student, teacher)


def test_the_first_differing_token_and_both_sizes_are_named(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher", texts=["zzz yyy zzz yyy zzz yyy"])
    tokens = [load_tokenizer(directory).get_vocab() for directory in (student, teacher)]
    assert "zz" in tokens[1] and "zz" not in tokens[0]
    first = 259  # three special tokens and 256 bytes are the same everywhere, the first merge is not
    names = [next((token for token, i in vocab.items() if i == first), None) for vocab in tokens]
    assert None not in names and names[0] != names[1]
    with pytest.raises(ConfigError) as refused:
        require_same_vocabulary(student, teacher)
    message = str(refused.value)
    assert f"id {first} is {names[0]!r} for the student and {names[1]!r} for the teacher" in message
    assert f"({len(tokens[0])} and {len(tokens[1])} tokens)" in message


def test_an_added_token_counts(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher")
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ConfigError, match=r"is no token for the student and '<think>' for the teacher"):
        require_same_vocabulary(student, teacher)


def test_equal_tokens_under_other_rules_are_refused(student, tmp_path):
    teacher = model_directory(tmp_path / "teacher")
    path = teacher / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules))
    with pytest.raises(ConfigError, match="cut text differently"):
        require_same_vocabulary(student, teacher)


@pytest.mark.parametrize(
    "changed",
    [{"eos": "<|endoftext|>", "generation_eos": 0}, {"generation_eos": [0, 2]}],
    ids=["another end token", "one more end token"],
)
def test_other_end_tokens_are_refused(student, tmp_path, changed):
    teacher = model_directory(tmp_path / "teacher", **changed)
    with pytest.raises(ConfigError, match=r"2 '<\|im_end\|>'.*0 '<\|endoftext\|>'"):
        require_same_vocabulary(student, teacher)


@pytest.mark.parametrize(
    ("eos", "generation_eos", "expected"),
    [
        ("<|im_end|>", 2, (2,)),
        ("<|im_end|>", [2, 0], (0, 2)),
        ("<|endoftext|>", 2, (0, 2)),
        ("<|im_end|>", None, (2,)),
    ],
)
def test_end_tokens_are_those_of_generation_config_and_tokenizer(tmp_path, eos, generation_eos, expected):
    assert end_token_ids(model_directory(tmp_path / "m", eos=eos, generation_eos=generation_eos)) == expected


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
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
    (student / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        vocab_size(student)
