"""What was computed is remembered by contents, and by nothing else."""

import os
import pickle
import pwd
import shutil
from pathlib import Path

import fakes
import pytest

from eopd import remember
from eopd.config import Config, load_config
from eopd.preflight import inputs
from eopd.remember import remembered


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(remember, "DIRECTORY", tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def ask(tmp_path):
    """Asks about two files, and says how often the answer was computed."""
    text = tmp_path / "a.json"
    weights = tmp_path / "b.safetensors"
    text.write_text("one")
    weights.write_text("1")
    computed = []

    def ask(question="q", *more):
        def compute():
            computed.append(question)
            return text.read_text()

        return remembered(question, [text, weights, *more], compute), len(computed)

    ask.text, ask.weights = text, weights

    return ask


def test_an_answer_is_computed_once(ask):
    assert ask() == ("one", 1)
    assert ask() == ("one", 1)


def test_another_question_text_or_library_is_computed(ask, monkeypatch):
    ask()
    assert ask("another") == ("one", 2)
    ask.text.write_text("two")
    assert ask() == ("two", 3)
    ask.text.write_text("one")
    assert ask() == ("one", 3)
    monkeypatch.setattr(remember, "version", lambda library: "99")
    assert ask() == ("one", 4)


def test_a_file_that_cannot_be_read_is_left_to_whoever_computes(ask, directory, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(remember.hashlib, "file_digest", refuse)
    assert ask() == ("one", 1)
    assert ask() == ("one", 2)
    assert not directory.exists()


def test_of_weights_name_size_and_time_count(ask, tmp_path):
    ask()
    assert ask() == ("one", 1)
    ask.weights.write_text("12")
    assert ask() == ("one", 2)
    os.utime(ask.weights, ns=(0, 1))
    assert ask() == ("one", 3)
    assert ask("q", tmp_path / "c.safetensors") == ("one", 4)
    assert ask("q", tmp_path / "c.safetensors") == ("one", 4)


def test_this_package_s_own_code_counts(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(remember.eopd, "__file__", str(tmp_path / "code" / "__init__.py"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "check.py").write_text("old")
    ask()
    (tmp_path / "code" / "check.py").write_text("new")
    assert ask() == ("one", 2)


def test_a_broken_memory_costs_the_memory_alone(ask, directory):
    ask()
    (kept,) = directory.iterdir()
    kept.write_bytes(b"no pickle")
    assert ask() == ("one", 2)
    assert pickle.loads(kept.read_bytes()) == "one"
    kept.unlink()
    directory.rmdir()
    directory.write_text("a file where the directory should be")
    assert ask() == ("one", 3)


def test_without_a_home_directory_nothing_is_remembered(ask, monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(remember, "DIRECTORY", Path("~/.cache"))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert [ask(), ask()] == [("one", 1), ("one", 2)]
    monkeypatch.setenv("HOME", "/proc/none")
    assert [ask(), ask()] == [("one", 3), ("one", 4)]


def test_what_fails_is_not_remembered(ask, directory):
    ask.text.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            ask()

    assert not directory.exists()


def test_the_oldest_answers_are_forgotten(ask, directory, monkeypatch):
    monkeypatch.setattr(remember, "KEEP", 2)
    ask("a"), ask("b")
    ask("a")  # used again
    ask("c")
    assert len(list(directory.iterdir())) == 2
    assert ask("a")[1] == 3
    assert ask("b")[1] == 4


def test_a_check_is_remembered_until_its_inputs_change(tiny_config, directory, monkeypatch):
    config, paths = tiny_config
    calls = []
    check = inputs._prepare
    monkeypatch.setattr(
        inputs,
        "_prepare",
        lambda config: calls.append(1) or check(config),
    )
    first = inputs.prepare(config)
    again = inputs.prepare(config)
    assert len(calls) == 1
    assert [p.token_ids.tolist() for p in again.train.prompts] == [
        p.token_ids.tolist() for p in first.train.prompts
    ]
    assert again.vocabularies == first.vocabularies
    for path in paths:
        path.write_text(path.read_text() + "\n")
        inputs.prepare(config)

    assert len(calls) == 1 + len(paths)


@pytest.mark.parametrize("has_more", [False, True])
def test_a_check_reads_no_section_that_it_is_not_asked_again_for(tiny_config, tmp_path, has_more):
    config, (rows, *_) = tiny_config
    if has_more:
        rows.write_text('{"prompt": "one", "answer": "1"}\n')
        more = (
            "student.lora={rank: 4}",
            "rollout.samples_per_prompt=2",
            "loss.reverse_kl={kind: sampled, reward: {function: exact}}",
            "teachers.0.template='{{ prompt }}'",
            f"evaluation={{every: 1, benchmarks: [{{name: b, data: {rows}}}]}}",
        )
        config = load_config(tmp_path / "c.yaml", more)

    read = set()

    class Watched(Config):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    watched = Watched(**{name: getattr(config, name) for name in Config.model_fields})
    read.clear()  # what the validation has read
    assert inputs._prepare(watched).benchmarks.keys() == ({"b"} if has_more else set())
    sections = read & Config.model_fields.keys()
    # a reward is known to need rows before a filter is looked for
    assert inputs._READ - {"flow"} <= sections <= inputs._READ


@pytest.mark.parametrize(
    ("section", "keys", "answers"), [("learner", {"lr": 0.5}, 1), ("loss", {"top_k": 8}, 2)]
)
def test_a_check_is_asked_again_where_a_section_changes_that_it_reads(
    tiny_config, directory, section, keys, answers
):
    config, _ = tiny_config
    changed = getattr(config, section).model_copy(update=keys)
    inputs.prepare(config)
    inputs.prepare(config.model_copy(update={section: changed}))
    assert len(list(directory.iterdir())) == answers


def test_a_check_with_a_grader_of_the_user_is_not_remembered(
    tiny_config, directory, tmp_path, monkeypatch
):
    """It is tried in it, and may change."""
    _, (rows, *_) = tiny_config
    rows.write_text('{"prompt": "one", "answer": "1"}\n')
    (tmp_path / "a_grader.py").write_text("def grade(response, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    benchmark = f"{{name: b, data: {rows}, grader: 'a_grader:grade'}}"
    config = load_config(
        tmp_path / "c.yaml", [f"evaluation={{every: 1, benchmarks: [{benchmark}]}}"]
    )
    monkeypatch.setattr(inputs, "_prepare", lambda config: "prepared")
    assert inputs._prepared(config) == "prepared"
    assert not directory.exists()


@pytest.fixture
def tiny_config(tiny_model, tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        shutil.copytree(tiny_model("qwen3", seed=seed), tmp_path / name)

    (tmp_path / "data.jsonl").write_text('{"prompt": "one"}\n')
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "two"}\n')
    data = f"data: {tmp_path}/data.jsonl, held_out: {tmp_path}/held_out.jsonl"
    path = fakes.write_config(
        tmp_path,
        batches=1,
        student=f"{{model: {tmp_path}/student}}",
        teachers=f"[{{model: {tmp_path}/teacher}}]",
        prompts=f"{{{data}, max_tokens: 64, template: none}}",
        flow="{batch_prompts: 1}",
        more="rollout: {max_response_tokens: 16}",
    )
    files = [
        tmp_path / "data.jsonl",
        tmp_path / "held_out.jsonl",
        tmp_path / "student" / "tokenizer.json",
        tmp_path / "teacher" / "tokenizer.json",
    ]
    return load_config(path), files
