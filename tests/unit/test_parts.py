"""Data as people have it: named columns, a system message, several parts, functions, subsets."""

import json
import re
import sys

import pytest

from eopd.config import ConfigError, Part, PromptsConfig
from eopd.config.shape import shape
from eopd.prompts import PromptSet
from eopd.prompts.files import read_part
from eopd.prompts.rows import read_question


class Tokenizer:
    """A tokenizer of words, whose ids are their lengths; its template shows every message, or
    not those of the system.
    """

    chat_template = "words"
    bos_token_id = None
    eos_token_id = None

    def __init__(self, system="shown"):
        self.system = system

    def encode(self, text, *, add_special_tokens=True):
        return [len(word) for word in text.split()]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        if self.system == "refused" and conversation[0]["role"] == "system":
            raise ValueError("System role not supported")

        shown = [m for m in conversation if self.system == "shown" or m["role"] != "system"]
        return " ".join(f"{m['role']} {m['content']}" for m in shown)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(**changes):
    values, _ = shape({"data": "a", "held_out": "b"} | changes, PromptsConfig)
    return PromptsConfig.model_validate(values)


def load(parts, tokenizer=None, **changes):
    settings = config(**{"data": parts, **changes})
    return PromptSet.load(settings.data, settings, tokenizer or Tokenizer())


@pytest.fixture
def file(tmp_path):
    return lambda *rows: write(tmp_path / "rows.jsonl", *rows)


# --- columns


def test_columns_play_roles_under_their_own_names(file):
    spec = file(
        {"key": "k1", "question": "a bb", "solution": 7, "kind": "math", "prompt": "no", "id": 1}
    )
    names = {"prompt": "question", "answer": "solution", "id": "key", "source": "kind"}
    (found,) = load(spec, columns=names).prompts
    assert found.token_ids.tolist() == [4, 1, 2]
    assert (found.prompt_id, found.source, found.reference_answer) == ("k1", "math", "7")


def test_a_named_chat_is_taken_although_there_is_a_prompt(file):
    spec = file({"prompt": "no", "messages": [{"role": "user", "content": "yes"}]})
    with pytest.raises(ConfigError, match="prompt, messages: both are there; keep the one"):
        load(spec)

    for columns in ({"messages": "messages"}, {"prompt": "messages"}):
        (found,) = load(spec, columns=columns).prompts
        assert found.token_ids.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("row", "name", "answer"),
    [
        (
            {"reward_model": {"style": "rule", "ground_truth": "7"}},
            "reward_model.ground_truth",
            "7",
        ),
        ({"answers": {"text": ["7", "seven"]}}, "answers.text", ("7", "seven")),
        ({"a": {"b": {"c": 7}}}, "a.b.c", "7"),
        ({"a.b": 7, "a": {"b": 8}}, "a.b", "7"),
        ({"a": {"b.c": 7}}, "a.b.c", "7"),
        ({"a": "no object"}, "a.b", None),
        ({"a": {"b": None}}, "a.b", None),
        ({}, "a.b", None),
    ],
)
def test_a_dot_leads_to_a_field_of_an_object(file, row, name, answer):
    whole = {"prompt": "a", "a": {"b": {"c": 1}}, "answers": {"text": "1"}}
    other = whole | {"a.b": 1, "reward_model": {"ground_truth": "1"}}
    first, _ = read_part(Part(data=file({"prompt": "a", **row}, other)), "k", {"answer": name})
    assert read_question(first, "").reference_answer == answer


def test_a_template_of_a_teacher_reads_a_column_under_both_names(file):
    (row,) = read_part(
        Part(data=file({"prompt": "a", "solution": 5, "answer": 6})), "k", {"answer": "solution"}
    )
    question = read_question(row, "")
    assert (question.columns["answer"], question.columns["solution"]) == (5, 5)
    assert question.reference_answer == "5"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "questoin"},
            "rows.jsonl: has no column 'questoin' to be prompt; did you mean 'question'? its "
            "columns are 'question', 'level', 'solution'",
        ),
        (
            {"prompt": "question", "answer": "xyz"},
            "rows.jsonl: has no column 'xyz' to be answer; its columns are 'question', ",
        ),
        ({"prompt": "question", "answer": "level.truth"}, "has no column 'level.truth' to be "),
        ({"prompt": "solution"}, "rows.jsonl:1: has no `solution`; its fields are `question`"),
        ({"prompt": "level"}, "(and 1 more row): level: must be text or a list of"),
        ({"prompt": "question", "id": "level"}, "rows.jsonl:2 (id 3): level: '3' stands twice"),
    ],
)
def test_a_column_that_cannot_play_its_role_is_named(file, columns, message):
    spec = file(
        {"question": "a", "level": 3},
        {"question": "b", "level": 3, "solution": "c"},
    )
    with pytest.raises(ConfigError) as caught:
        load(spec, columns=columns)

    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["meta.trueth", "truth"])
def test_a_field_of_an_object_is_named_where_it_was_meant(file, name):
    spec = file({"prompt": "a", "meta": {"truth": "7", "style": "rule"}})
    columns = "'prompt', 'meta', 'meta.truth', 'meta.style'" if "." in name else "'prompt', 'meta'"
    with pytest.raises(ConfigError) as caught:
        load(spec, columns={"answer": name})

    assert str(caught.value).endswith(
        f"has no column {name!r} to be answer; did you mean 'meta.truth'? its columns are {columns}"
    )


def test_the_first_of_many_columns_are_named(file):
    spec = file({f"c{number}": 0 for number in range(25)})
    with pytest.raises(ConfigError, match=r"columns are 'c0', .*'c19' and 5 more$"):
        load(spec, columns={"prompt": "question"})


def test_a_role_that_no_row_needs_may_be_missing_in_some(file):
    spec = file({"prompt": "a", "solution": "b"}, {"prompt": "a"})
    found = load(spec, columns={"answer": "solution"}).prompts
    assert [prompt.reference_answer for prompt in found] == ["b", None]


# --- the system message


def test_a_system_message_goes_before_what_has_none(file):
    ask = {"role": "user", "content": "a"}
    spec = file(
        {"prompt": "a"},
        {"messages": [ask]},
        {"messages": [{"role": "system", "content": "mine"}, ask]},
        {"messages": [{"role": "developer", "content": "mine"}, ask]},
    )
    found = load(spec, system="be brief", suffix=" now").prompts
    first, second, third, fourth = (prompt.token_ids.tolist() for prompt in found)
    assert first == second == [6, 2, 5, 4, 1, 3]
    assert third == [6, 4, 4, 1, 3]
    assert fourth == [9, 4, 4, 1, 3]


@pytest.mark.parametrize(
    ("system", "fault"),
    [("refused", "System role not supported"), ("hidden", "it is not in the text")],
)
def test_a_template_without_system_messages_is_one_message(file, system, fault):
    spec = file({"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(ConfigError) as caught:
        load(spec, Tokenizer(system), system="be brief")

    assert str(caught.value) == (
        f"prompts.system: the student's chat template takes no system message ({fault}); leave "
        "it out (--system of eopd eval), or say it in prompts.suffix"
    )
    assert len(load(spec, Tokenizer(system)).prompts) == 2


# --- parts


@pytest.fixture
def two(tmp_path):
    first = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "id": 7, "source": "own"},
        {"prompt": "b"},
    )
    second = write(tmp_path / "b.jsonl", {"question": "cc"}, {"question": "dd", "id": 7})
    return [first, {"data": second, "source": "web", "columns": {"prompt": "question"}}]


def test_parts_have_ids_sources_and_columns_of_their_own(two, tmp_path):
    found = load(two)
    told = [(prompt.prompt_id, prompt.source) for prompt in found.prompts]
    assert told == [("0/7", "own"), ("0/2", "default"), ("1/1", "web"), ("1/7", "web")]
    first, second = found.parts
    assert [prompt.prompt_id for prompt in first] == ["0/7", "0/2"]
    assert [prompt.prompt_id for prompt in second] == ["1/1", "1/7"]
    assert found.texts == {"0/7": "a", "0/2": "b", "1/1": "cc", "1/7": "dd"}
    assert found.places["1/7"] == f"prompts.data.1: {tmp_path}/b.jsonl:2 (id 7)"


def test_held_out_prompts_are_of_all_parts_in_turn(two, tmp_path):
    long = write(tmp_path / "c.jsonl", *({"prompt": "e"} for _ in range(3)))
    found = load([*two, long]).in_turn()
    assert [prompt.prompt_id for prompt in found.prompts] == [
        "0/7", "1/1", "2/1", "0/2", "1/7", "2/2", "2/3",
    ]  # fmt: skip


def test_one_part_keeps_its_ids(two):
    assert [prompt.prompt_id for prompt in load(two[:1]).prompts] == ["7", "2"]
    assert [prompt.prompt_id for prompt in load(two[1]).prompts] == ["1", "7"]


def test_the_faults_of_all_parts_are_told_at_once(two, tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": 3})
    two[1]["columns"] = {"prompt": "query"}
    with pytest.raises(ConfigError) as caught:
        load(two)

    first, second = str(caught.value).splitlines()
    assert first.startswith(f"prompts.data.0: {tmp_path}/a.jsonl:1: prompt: must be text or a list")
    assert second.startswith(f"prompts.data.1: {tmp_path}/b.jsonl: has no column 'query' to be ")


def test_a_part_of_which_nothing_is_left_is_named(two, tmp_path):
    write(tmp_path / "b.jsonl", {"question": "d " * 9})
    with pytest.raises(ConfigError) as caught:
        load(two, max_tokens=5, overlong="drop")

    assert str(caught.value) == (
        f"prompts.data.1: {tmp_path}/b.jsonl: all 1 rows are longer than prompts.max_tokens 5"
    )


def test_the_source_of_a_part_counts_before_a_column(file):
    spec = file({"prompt": "a", "source": "own"})
    for part in ({"data": spec, "source": "web"}, {"data": spec, "source": "web", "columns": {}}):
        (found,) = load(part, columns={"source": "kind"}).prompts
        assert found.source == "web"


# --- functions


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the working directory, by its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(text):
        (tmp_path / "rows_of_mine.py").write_text(text)
        monkeypatch.delitem(sys.modules, "rows_of_mine", raising=False)
        return "rows_of_mine:rows"

    yield make
    sys.modules.pop("rows_of_mine", None)


def test_a_function_yields_rows_and_is_called_once(module):
    function = module(
        "calls = []\n"
        "def rows(*, most=1):\n"
        "    calls.append(most)\n"
        "    for n in range(most):\n"
        "        yield {'question': f'{n} + 1', 'answer': n + 1}\n"
    )
    part = {"function": function, "options": {"most": 3}, "columns": {"prompt": "question"}}
    found = load(part)
    told = [(prompt.prompt_id, prompt.reference_answer) for prompt in found.prompts]
    assert told == [("1", "1"), ("2", "2"), ("3", "3")]
    assert found.places["3"] == "prompts.data: rows_of_mine:rows: row 3"
    assert sys.modules["rows_of_mine"].calls == [3]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield {'prompt': 'a'}\n    yield {'prompt': 3}", "row 2: prompt: must be text or a"),
        ("yield {'prompt': 'a'}\n    yield 'b'", "row 2 is str; every row must be a mapping"),
        ("return []", "rows_of_mine:rows has no rows"),
        ("return None", "rows_of_mine:rows: returned None; it must yield rows"),
        ("return 3", "rows_of_mine:rows: returned a value of type int; it must yield rows"),
        ("raise OSError('no disk')", "rows_of_mine:rows: raised OSError: no disk ("),
        ("yield {'prompt': 'a', 'id': 1}\n    yield {'prompt': 'b', 'id': 1}",
         "row 2 (id 1): id: '1' stands twice"),
    ],
)  # fmt: skip
def test_a_function_that_fails_is_named_with_its_row(module, body, message):
    with pytest.raises(ConfigError) as caught:
        load({"function": module(f"def rows():\n    {body}\n")})

    assert str(caught.value).startswith("prompts.data: rows_of_mine:rows")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "kind"), [("return []", "coroutine"), ("yield {'prompt': 'a'}", "async_generator")]
)
def test_a_function_that_is_awaited_yields_no_rows(module, body, kind):
    with pytest.raises(ConfigError) as caught:
        load({"function": module(f"async def rows():\n    {body}\n")})

    said = f"returned a value of type {kind}; it must yield rows"
    assert str(caught.value) == f"prompts.data: rows_of_mine:rows: {said}"


# --- folders, and subsets of data sets


def test_files_of_a_folder_that_differ_in_their_columns_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train-1.jsonl", {"prompt": "a", "level": 1})
    write(folder / "train-2.jsonl", {"prompt": "b", "meta": {"truth": 7}})
    with pytest.raises(ConfigError) as caught:
        load(f"{folder}:train")

    assert str(caught.value) == (
        f"prompts.data: data set {folder}:train: a file of it has other columns than the first "
        "one ('meta'); name its files one by one, in a list"
    )


def test_subsets_and_splits_of_a_data_set_are_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sums"
    folder.mkdir()
    names = [f"{subset}_{split}" for subset in ("main", "hard") for split in ("train", "test")]
    for name in names:
        write(
            folder / f"{name}.jsonl",
            {"question": f"{name} a"},
            {"question": f"{name} b"},
        )

    subsets = "".join(
        f"- config_name: {subset}\n  data_files:\n"
        f"  - {{split: train, path: {subset}_train.jsonl}}\n"
        f"  - {{split: test, path: {subset}_test.jsonl}}\n"
        for subset in ("main", "hard")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    parts = [f"{folder}:main:train", f"{folder}:hard:test[1:]"]
    found = load(parts, columns={"prompt": "question"})
    assert found.texts == {"0/1": "main_train a", "0/2": "main_train b", "1/1": "hard_test b"}
    with pytest.raises(ConfigError, match=r"prompts.data: .*:easy:train cannot be loaded: .*easy"):
        load(f"{folder}:easy:train", columns={"prompt": "question"})


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (
            {"a.jsonl": '{"prompt": "x"}', "c.jsonl": '{"prompt": "x"}', "b.csv": "prompt\ny"},
            "b.csv",
        ),
        ({"train/a.csv": "prompt\ny", "train/c.csv": "prompt\ny", "b.tsv": "prompt\nz"}, "b.tsv"),
        ({"train_a.jsonl": '{"prompt": "x"}', "b.jsonl": '{"prompt": "y"}'}, "b.jsonl"),
        ({"test_a.jsonl": '{"prompt": "x"}', "b.jsonl": '{"prompt": "y"}'}, "b.jsonl"),
    ],
)
def test_a_folder_is_not_read_in_part(tmp_path, files, left_out):
    folder = tmp_path / "rows"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    (folder / "README.md").write_text("Rows of mine.\nconfigs: none\n")
    told = f"rows: 1 of its files would be left out ({left_out}): "
    with pytest.raises(ConfigError, match=re.escape(told)):
        load(f"{folder}:train")


def test_a_folder_of_one_kind_may_hold_what_is_no_rows(tmp_path):
    folder = tmp_path / "rows"
    (folder / ".cache").mkdir(parents=True)
    write(folder / "a.jsonl", {"prompt": "x"})
    write(folder / "b.ndjson", {"prompt": "y"})
    (folder / ".cache" / "old.csv").write_text("prompt\nz")
    (folder / "notes.txt").write_text("made by hand")
    assert load(f"{folder}:train").texts == {"1": "x", "2": "y"}


def test_a_folder_may_hold_links_and_folders_named_like_files(tmp_path):
    (tmp_path / "blobs").mkdir()
    write(tmp_path / "blobs" / "1f", {"prompt": "x"})
    folder = tmp_path / "rows"
    (folder / "part.jsonl").mkdir(parents=True)
    (folder / "train.jsonl").symlink_to(tmp_path / "blobs" / "1f")
    (folder / "part.jsonl" / "train-0.jsonl").symlink_to(tmp_path / "blobs" / "1f")
    assert len(load(f"{folder}:train").prompts) == 2
    (folder / "more.JSONL").write_text('{"prompt": "y"}')
    with pytest.raises(ConfigError, match=r"1 of its files would be left out \(more.JSONL\)"):
        load(f"{folder}:train")
