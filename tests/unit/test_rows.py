"""Odd rows: each is taken as what it plainly means, or refused with file, row, field and what
is allowed.
"""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from eopd.config import ConfigError
from eopd.prompts import DataRow, read_data
from eopd.prompts.rows import ANSWER_LEFT_OUT, read_question, written

ASK = {"role": "user", "content": "a?"}
SAY = {"role": "assistant", "content": "b."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(suffix="", **columns):
    return read_question(DataRow(where="rows.jsonl:7", number=7, columns=columns), suffix)


# --- answer, id, source


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ("72", "72"),
        ("", ""),  # whether a grader can read it is asked where one is used
        (None, None),
        (72, "72"),
        (72.0, "72"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (2**1100, str(2**1100)),
        ([-(2**1100)], str(-(2**1100))),
        (Decimal("1.50"), "1.5"),
        (["Paris", "paris", "Paris"], ("Paris", "paris")),
        ([72], "72"),
        ([0.5, "1/2"], ("0.5", "1/2")),
    ],
)
def test_answers_are_text_numbers_or_several(answer, taken):
    assert read(prompt="a", answer=answer).reference_answer == taken


def test_a_number_is_written_as_a_person_writes_it():
    assert written(100) == "100"
    assert written(1500.0) == "1500"
    assert written(2.50) == "2.5"
    assert written(12345678901234567890) == "12345678901234567890"


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"id": "x"}, "x"),
        ({"id": 1}, "1"),
        ({"id": 1.0}, "1"),  # a table with missing ids has these
        ({"id": None}, "7"),
        ({}, "7"),
    ],
)
def test_ids_are_text_whole_numbers_or_the_row_s_number(columns, taken):
    assert read(prompt="a", **columns).prompt_id == taken


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"answer": True},
            "answer: must be text, a number, or a list of these that are all right; is true",
        ),
        ({"answer": float("nan")}, "answer: must be .*; is a number that is not finite"),
        ({"answer": float("-inf")}, "answer: must be .*; is a number that is not finite"),
        ({"answer": {"text": "5"}}, "answer: must be .*; is an object"),
        ({"answer": []}, "answer: is an empty list"),
        ({"answer": ["5", None]}, "answer: must be .*; is null"),
        ({"answer": [["5"]]}, "answer: must be .*; is a list"),
        ({"answer": "\udc00"}, r"answer: holds half a character \(\\udc00 at position 0\)"),
        ({"answer": ["5", "\ud83d"]}, r"answer: holds half a character \(\\ud83d"),
        ({"id": 1.5}, "id: must be text or a whole number, is the number 1.5"),
        ({"id": False}, "id: must be text or a whole number, is false"),
        ({"id": ["x"]}, "id: must be text or a whole number, is a list"),
        ({"id": " "}, "id: must be text or a whole number, is empty text"),
        ({"id": "a\ud83d"}, r"id: holds half a character \(\\ud83d at position 1\)"),
        ({"source": 2**20000}, "source: must be text, is a number of more than 60 digits"),
        ({"source": 3}, "source: must be text, is the number 3"),
        ({"source": ["math"]}, "source: must be text, is a list"),
        ({"source": ""}, "source: must be text, is empty text"),
        ({"source": "\udfff"}, "source: holds half a character"),
        ({"source": "a\0"}, r"source: holds the NUL character \(\\u0000 at position 1\)"),
        (
            {"tools": {"name": "f"}},
            r"tools: must be a list of JSON schemas \(objects\), is an object",
        ),
        ({"tools": ["f"]}, "tools: must be a list of JSON schemas"),
        ({"tools": "[{]"}, "tools: is text, which is not JSON: Expecting"),
        ({"tools": [{"name": "\ud83d"}]}, "tools: holds half a character"),
    ],
)
def test_a_field_that_means_nothing_is_refused(columns, message):
    with pytest.raises(ConfigError, match=r"^rows.jsonl:7: " + message):
        read(prompt="a", **columns)


@pytest.mark.parametrize(
    ("line", "field", "written", "meant"),
    [
        (r'{"prompt": "a", "answer": "\frac{1}{2}"}', "answer", r"\f (at position 0)", r"\\frac"),
        (r'{"prompt": "a", "answer": "\boxed{5}"}', "answer", r"\b (at position 0)", r"\\boxed"),
        (
            r'{"prompt": "a", "answer": ["5", "\theta"]}',
            "answer",
            r"\t (at position 0)",
            r"\\theta",
        ),
        (r'{"prompt": "a", "answer": "2\times 3"}', "answer", r"\t (at position 1)", r"\\times"),
        (r'{"prompt": "a", "answer": "\text{yes}"}', "answer", r"\t (at position 0)", r"\\text"),
        (r'{"prompt": "a", "answer": "\tan x"}', "answer", r"\t (at position 0)", r"\\tan"),
        (r'{"prompt": "a", "answer": "x\to a"}', "answer", r"\t (at position 1)", r"\\to"),
        (r'{"prompt": "put it in \boxed{}"}', "prompt", r"\b (at position 10)", r"\\boxed"),
        (r'{"prompt": "lim x\to 0 of \\sin x"}', "prompt", r"\t (at position 5)", r"\\to"),
        (r'{"prompt": "\tan(x) + \tan^2 x"}', "prompt", r"\t (at position 0)", r"\\tan"),
        (r'{"prompt": "x \rightarrow y"}', "prompt", r"\r (at position 2)", r"\\rightarrow"),
        (
            r'{"messages": [{"role": "user", "content": "what is \frac12"}]}',
            "messages, number 1, content",
            r"\f (at position 8)",
            r"\\frac",
        ),
    ],
)
def test_a_backslash_that_json_took_is_refused(line, field, written, meant):
    with pytest.raises(ConfigError) as caught:
        read(**json.loads(line))

    assert str(caught.value) == (
        f"rows.jsonl:7: {field}: holds the control character {written}, which JSON makes of "
        f"{meant[1:]}; double the backslash: {meant}"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a\tb",
        "\tan apple",
        "\tan 8-bit number",
        "\text := path.Ext(name)",
        "x\to\tx\no\tx\to",
        "\to todo",
        "\tau pain",
        "the end\fchapter two\f\fThe third",
        "a\r\nb",
        "\neq",
        r"\boxed{\theta}",
    ],
)
def test_tabs_and_line_ends_of_prose_and_code_are_taken(text):
    assert read(prompt=text).text == text


def test_a_missing_source_is_the_default_one():
    assert read(prompt="a").source == read(prompt="a", source=None).source == "default"


# --- prompts and chats


def test_a_chat_may_stand_under_prompt():
    assert read(prompt=[ASK]).chat == [ASK]
    assert read(messages=[ASK]).chat == [ASK]
    assert read(prompt="a?").chat == [ASK]


def test_the_answer_at_the_end_of_a_chat_is_left_out_and_noted():
    found = read(messages=[ASK, SAY, ASK, SAY, {**SAY, "content": "more"}], suffix=" Be brief.")
    assert found.chat == [ASK, SAY, {"role": "user", "content": "a? Be brief."}]
    assert found.notes == [ANSWER_LEFT_OUT]
    assert read(messages=[ASK, SAY, ASK]).notes == []


def test_the_suffix_goes_to_the_last_text_of_the_user():
    asked = {**SAY, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "12 C"}
    found = read(messages=[ASK, asked, result], suffix="!")
    assert texts(found.chat) == ["a?!", "b.", "12 C"]
    assert found.text == "a?!"
    assert found.last_user == 0
    assert texts(found.with_text("other")) == ["other", "b.", "12 C"]


def texts(chat):
    return [message["content"] for message in chat]


def test_what_else_a_message_holds_is_kept():
    turn = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [CALL],
        "name": None,
    }
    answer = {"role": "tool", "content": "12 C", "tool_call_id": "a", "name": "f"}
    result = {**answer, "tool_calls": []}
    _, kept, kept_result = read(messages=[ASK, turn, result]).chat
    assert kept == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [CALL],
    }
    assert kept_result == answer


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}])
def test_arguments_of_a_call_become_an_object(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    flat = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "content": "", "tool_calls": [call, flat]}
    assert read(messages=[ASK, turn, ASK]).chat[1]["tool_calls"] == [
        CALL,
        {"name": "f", "arguments": {"x": 1}},
    ]


def test_parts_of_text_are_one_text_a_line_each():
    parts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    assert read(messages=[{"role": "user", "content": parts}]).text == "look\nhere"


def test_messages_may_be_json_text_and_a_prompt_that_is_one_is_noted():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert read(messages=json.dumps(chat)).chat == chat
    question = read(prompt=json.dumps(chat))
    assert question.text == json.dumps(chat)
    (note,) = question.notes
    assert "prompts.columns: {messages: prompt}" in note
    assert not read(prompt="[1, 2] and a role").notes


def test_tools_may_be_json_text():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read(prompt="a", tools=json.dumps(tools)).tools == tools
    assert read(prompt="a", tools=tools).tools == tools
    assert not read(prompt="a", tools=None).tools


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "needs either `prompt` .*; its fields are `question`, `answer`",
        ),
        ({"prompt": "a", "messages": [ASK]}, "prompt, messages: both are there"),
        ({"prompt": None}, "prompt: is null; write text, or a list of messages"),
        ({"prompt": None, "messages": None, "x": 1}, "prompt, messages: is null; write text"),
        ({"prompt": 5}, "prompt: must be text or a list of messages, is the number 5"),
        ({"prompt": ""}, "prompt: the user's text is empty"),
        ({"prompt": " \n"}, "prompt: the user's text is empty"),
        ({"prompt": "a\ud83d"}, r"prompt: holds half a character \(\\ud83d at position 1\)"),
        ({"prompt": "a\0"}, "prompt: holds the NUL character"),
        ({"messages": []}, "messages: must be a list of messages, is an empty list"),
        (
            {"messages": '[{"role": "user", "content": 1'},
            "messages: is text, which is not JSON: Expecting ',' delimiter",
        ),
        ({"messages": "a"}, 'messages: must be a list of messages, is "a"'),
        ({"messages": ["a"]}, "messages, number 1: must be an object with role and content, is"),
        ({"messages": [SAY]}, r"messages: none is the user's"),
        ({"messages": [{**ASK, "role": "system"}]}, r"messages: none is the user's"),
        (
            {"messages": [{**ASK, "role": "human"}]},
            'messages, number 1, role: must be one of .*user.*; is "human"',
        ),
        (
            {"messages": [{"content": "a"}]},
            "messages, number 1: has no role; its fields are `content`. A message has",
        ),
        (
            {"messages": [ASK, {**ASK, "content": None}]},
            "messages, number 2, content: must be text .*, is null",
        ),
        (
            {"messages": [ASK, {**SAY, "content": None}, ASK]},
            "messages, number 2, content: must be text .*, is null",
        ),
        ({"messages": [{**ASK, "content": ""}]}, "messages: the user's text is empty"),
        (
            {"messages": [{**ASK, "content": [{"type": "image"}]}]},
            'messages, .*, content: every part .*; one is "image"',
        ),
        (
            {"messages": [{**ASK, "content": ["a"]}]},
            "messages, number 1, content: every part must be",
        ),
        (
            {"messages": [{**ASK, "content": "\ud83d"}]},
            "messages, number 1, content: holds half a character",
        ),
        (
            {"messages": [ASK, {**SAY, "thinking": "\ud83d"}, ASK]},
            "messages, number 2, thinking: holds half",
        ),
        (
            {"messages": [ASK, {**SAY, "\ud83d": 1}, ASK]},
            "messages, number 2: holds half a character",
        ),
        (
            {"messages": [ASK, {**SAY, "tool_calls": "f"}]},
            'messages, number 2, tool_calls: must be a list, is "f"',
        ),
        (
            {"messages": [ASK, {**SAY, "tool_calls": ["f"]}]},
            "messages, number 2, tool_calls: each must be",
        ),
        (
            {"messages": [ASK, {**SAY, "tool_calls": [{"name": "f", "arguments": "x: 1"}]}]},
            "messages, number 2, tool_calls, arguments: is text, which is not JSON: "
            "Expecting value",
        ),
    ],
)
def test_a_prompt_that_is_none_is_refused(columns, message):
    with pytest.raises(ConfigError, match=r"^rows.jsonl:7: " + message):
        read(**columns)


# --- files


def test_lines_are_counted_from_one_and_rows_say_where_they_stand(tmp_path):
    path = tmp_path / "rows.jsonl"
    # with a byte order mark
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b", "id": "x"}\n')
    first, second = read_data(str(path), "prompts.held_out")
    assert first.number == 1
    assert first.where == f"prompts.held_out: {path}:1"
    assert second.number == 3
    assert second.where == f'prompts.held_out: {path}:3 (id "x")'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"rows.jsonl:2: is not UTF-8: .* at byte 28"),
        (b'{"prompt": "a", "prompt": "b"}\n', r"rows.jsonl:1: names 'prompt' twice"),
        (
            b'{"answer": ' + b"9" * 5000 + b"}\n",
            r"rows.jsonl:1: holds a number of more than 4300 digits; write",
        ),
        (b"[" * 100_000, r"rows.jsonl:1: is nested too deeply$"),
        (
            b'{"answer": "\\sqrt{2}"}\n',
            r"rows.jsonl:1: is not JSON: Invalid \\escape \(column 13\); "
            "a backslash of a text is written twice",
        ),
        (
            b'{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}',
            r"rows.jsonl:2: begins with a byte order mark, which JSON has",
        ),
        (b"null\n", r"rows.jsonl:1: must be an object such as .*, is null"),
    ],
)
def test_a_file_that_is_no_jsonl_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_data(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "rows.csv",
        "rows.json",
        "rows.jsonl.gz",
        "rows.JSONL",
        "rows.txt",
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, name):
    message = r"must be .jsonl \(a JSON object a line\), .parquet, or the name"
    for spec in (name, str(tmp_path / name)):
        with pytest.raises(ConfigError, match=message):
            read_data(spec)


def test_files_without_and_directories_with_an_ending_are_refused(tmp_path):
    file = tmp_path / "rows"
    file.write_text("")
    with pytest.raises(ConfigError, match="files that end in nothing are not read"):
        read_data(str(file))

    directory = tmp_path / "rows.parquet"
    directory.mkdir()
    with pytest.raises(ConfigError, match=r"rows.parquet is a directory"):
        read_data(str(directory))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv", ""])
@pytest.mark.parametrize("method", ["is_dir", "is_file", "read_bytes"])
def test_what_may_not_be_read_is_one_message(tmp_path, monkeypatch, ending, method):
    def closed(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    name = str(tmp_path / f"{'x' * 300}{ending}")
    told = f"prompts.data: {name} "
    with pytest.raises(ConfigError) as caught:
        read_data(name)

    assert str(caught.value).startswith(
        (f"{told}cannot be read (File name too long)", f"{told}must be .jsonl")
    )
    monkeypatch.setattr(Path, method, closed)
    path = tmp_path / f"rows{ending}"
    path.write_bytes(b"")
    message = r"^prompts.data: .*(cannot be read|must be .jsonl|has no rows)"
    with pytest.raises(ConfigError, match=message):
        read_data(str(path))


def test_broken_and_empty_parquet_files_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"broken.parquet cannot be read: .*Parquet"):
        read_data(str(broken))

    empty = tmp_path / "empty.parquet"
    table = pyarrow.table({"prompt": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(table, empty)
    with pytest.raises(ConfigError, match=r"empty.parquet has no rows"):
        read_data(str(empty))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_git_lfs_pointer_is_named(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n")
    with pytest.raises(ConfigError) as caught:
        read_data(str(path))

    assert str(caught.value) == (
        f"prompts.data: {path} is a Git LFS pointer, not the file itself; fetch that with "
        "`git lfs pull`"
    )


def parquet(tmp_path, names, columns):
    import pyarrow
    import pyarrow.parquet

    arrays = [pyarrow.array(values, kind) for values, kind in columns]
    table = pyarrow.Table.from_arrays(arrays, names=names)
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    return str(path)


def test_narrow_floats_are_the_shortest_numbers_that_they_are(tmp_path):
    import pyarrow

    single, half = pyarrow.float32(), pyarrow.float16()
    nested = pyarrow.struct([("x", single)])
    spec = parquet(
        tmp_path,
        ["answer", "half", "several", "inside", "double"],
        [
            ([0.1, 72.0, 1e-7, None], single),
            (np.array([0.1, 2048, 0.5, 3], np.float16), half),
            ([[0.1, 0.7], [], None, [3.5]], pyarrow.list_(single)),
            ([{"x": 0.1}, {"x": None}, None, {"x": 16777216.0}], nested),
            ([0.1, 0.30000000000000004, float(np.float32(0.1)), 1e22], pyarrow.float64()),
        ],
    )
    first, second, third, fourth = (row.columns for row in read_data(spec))
    assert first == {
        "answer": 0.1,
        "half": 0.1,
        "several": [0.1, 0.7],
        "inside": {"x": 0.1},
        "double": 0.1,
    }
    assert second["answer"] == 72.0
    assert third["answer"] == 1e-7
    assert fourth["answer"] is None
    assert second["half"] == 2048.0
    assert second["inside"] == {}
    assert fourth["inside"] == {"x": 16777216.0}
    assert second["double"] == 0.30000000000000004
    assert third["double"] == 0.10000000149011612


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [(["a"], "string"), (["b"], "string")]
    spec = parquet(tmp_path, ["prompt", "prompt"], columns)
    message = r"rows.parquet: has two columns named 'prompt'; which one counts\?$"
    with pytest.raises(ConfigError, match=message):
        read_data(spec)


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        (2**62, ("us", None)),
        (1, ("s", "Mars/X")),
    ],
)
def test_a_time_that_is_none_is_named_with_its_column(tmp_path, when, kind):
    import pyarrow

    spec = parquet(
        tmp_path,
        ["prompt", "when"],
        [(["a", "b"], "string"), ([0, when], pyarrow.timestamp(*kind))],
    )

    message = r"rows.parquet: column when: row [12]: its timestamp.* cannot be read \(.*; take"
    with pytest.raises(ConfigError, match=message):
        read_data(spec)


def test_what_an_arrow_table_fills_up_is_taken_out_again(tmp_path):
    import pyarrow
    import pyarrow.parquet

    chats = [[ASK, {**SAY, "name": "x"}], [ASK]]
    table = pyarrow.Table.from_pylist([{"messages": chat, "id": None} for chat in chats])
    assert table.to_pylist()[1]["messages"] == [{**ASK, "name": None}]
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = read_data(str(tmp_path / "rows.parquet"))
    assert [row.columns["messages"] for row in rows] == chats
    assert [row.where[-5:] for row in rows] == ["row 1", "row 2"]


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("gsm8k", ("gsm8k", None, "train")),
        ("open-thoughts/OpenThoughts3-1.2M", ("open-thoughts/OpenThoughts3-1.2M", None, "train")),
        ("a/b-1.5:test", ("a/b-1.5", None, "test")),
        ("openai/gsm8k:main:train", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main:train[10:20]", ("openai/gsm8k", "main", "train[10:20]")),
        ("openai/gsm8k:train[:5%]", ("openai/gsm8k", None, "train[:5%]")),
    ],
)
def test_a_data_set_is_named_with_subset_and_split(monkeypatch, spec, arguments):
    import datasets

    def load_dataset(name, subset, *, split, revision):
        assert (name, subset, split) == arguments
        return datasets.Dataset.from_list([{"prompt": "a", "id": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = read_data(spec)
    assert row.columns == {"prompt": "a", "id": None}
    assert row.where == f"prompts.data: {spec}: row 1"


@pytest.mark.parametrize("spec", ["a:b:c:d", ":train", "a:", "a::b"])
def test_a_data_set_with_too_many_or_empty_parts_is_refused(spec):
    with pytest.raises(ConfigError, match="must be NAME, NAME:SPLIT or NAME:SUBSET:SPLIT"):
        read_data(spec)


def test_narrow_floats_of_a_data_set_are_the_shortest_numbers(monkeypatch):
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "answer": datasets.Value("float32"),
        }
    )
    columns = {"prompt": ["a"], "answer": [0.1]}
    held = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held)
    (row,) = read_data("org/name")
    assert row.columns == {"prompt": "a", "answer": 0.1}


def test_whatever_a_data_set_raises_is_one_message(monkeypatch):
    import datasets

    def load_dataset(*arguments, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    message = r"a/b:main cannot be loaded: list index .*; a subset is named as NAME"
    with pytest.raises(ConfigError, match=message):
        read_data("a/b:main")
