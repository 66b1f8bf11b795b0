import json
import re
import sys

import pytest

from eopd import plugins
from eopd.config import ConfigError
from eopd.plugins import DataFunction, FilterFunction, RewardFunction, cause_of

FUNCTIONS = {"k": "scores_d.rewards:score"}
SCORE = "def score(row, response, response_ids, *, scale=1.0):\n    return scale * len(response)\n"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A working directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path

    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_of_the_working_directory_has_its_options_bound(directory):
    (directory / "scores_a.py").write_text(SCORE)

    score = plugins.load("k", "scores_a:score", RewardFunction, {"scale": 0.5})

    assert score({}, "four", [1]) == 2.0


def test_a_file_of_the_working_directory_stands_in_for_no_library(directory):
    (directory / "wave.py").write_text("def open(*args):\n    return 'ours'\n")

    found = plugins.load("k", "wave:open", FilterFunction, {})

    assert found.func.__module__ == "wave" and "python3.11" in sys.modules["wave"].__file__


@pytest.mark.parametrize(
    ("source", "function", "words"),
    [
        (SCORE, "scores", "must be package.module:name"),
        (SCORE, "a b:score", "must be package.module:name"),
        (SCORE, "missing_b.deep:score", "there is no module missing_b,"),
        (SCORE, "scores_b.deep:score", "there is no module scores_b.deep,"),
        (SCORE, "scores_b:scores", "there is no 'scores' in {directory}/scores_b.py"),
        ("score = 3\n", "scores_b:score", "is int, which cannot be called"),
        ("import absent_b\n", "scores_b:score", "No module named 'absent_b' ({directory}/"),
        ("x = 1\n1 / 0\n", "scores_b:score", "ZeroDivisionError: division by zero ({directory}/"),
        ("raise SystemExit(3)\n", "scores_b:score", "importing scores_b raised SystemExit: 3"),
        ("def (:\n", "scores_b:score", "SyntaxError: invalid syntax (scores_b.py, line 1)"),
        ("def score(a): pass\n", "scores_b:score", "its parameters are (a), it is called with row"),
        ("def score(a, b, c): pass\n", "scores_b:score", "the options scale: got an unexpected"),
    ],
)
def test_a_mistake_names_the_key_the_function_and_the_cause(directory, source, function, words):
    (directory / "scores_b.py").write_text(source)

    with pytest.raises(ConfigError) as caught:
        plugins.load("loss.gate.function", function, RewardFunction, {"scale": 1.0})

    message = str(caught.value)
    assert message.startswith("loss.gate.function: ") and function in message
    assert words.format(directory=directory) in message and "\n" not in message


def test_a_package_that_lacks_a_library_is_there(directory):
    package = directory / "scores_c"
    package.mkdir()
    (package / "__init__.py").write_text("import absent_c\n")
    (package / "deep.py").write_text(SCORE)

    with pytest.raises(ConfigError, match=r"importing scores_c\.deep raised ModuleNotFoundError"):
        plugins.load("k", "scores_c.deep:score", RewardFunction, {})


def test_the_hash_is_of_all_files_of_the_package(directory):
    package = directory / "scores_d"
    package.mkdir()
    (package / "rewards.py").write_text(SCORE)
    (package / "helpers.py").write_text("A = 1\n")
    plugins.load("k", "scores_d.rewards:score", RewardFunction, {})
    first = plugins.sources(FUNCTIONS)

    (package / "helpers.py").write_text("A = 2\n")
    second = plugins.sources(FUNCTIONS)
    (package / "helpers.py").write_text("A = 1\n")

    assert re.fullmatch(r"scores_d\.rewards:score, sha256 [0-9a-f]{64}", first["k"])
    assert second != first
    assert plugins.sources(FUNCTIONS) == first


def test_the_version_is_that_of_the_installed_distribution():
    import importlib.metadata

    plugins.load("k", "yaml:safe_load", FilterFunction, {})

    version = importlib.metadata.version("PyYAML")
    assert (
        f"yaml:safe_load, version {version}, sha256 "
        in plugins.sources({"k": "yaml:safe_load"})["k"]
    )


def test_rows_come_from_a_generator(directory):
    (directory / "rows_a.py").write_text(
        "def rows(*, n=1):\n    for i in range(n):\n        yield {'id': i}\n"
    )

    assert plugins.rows_of("k", "rows_a:rows", {"n": 2}) == [{"id": 0}, {"id": 1}]


def test_a_row_stays_as_it_was_yielded(directory):
    (directory / "rows_d.py").write_text(
        "def rows():\n    row = {'tags': []}\n    for i in range(3):\n"
        "        row['id'] = i\n        row['tags'].append(i)\n        yield row\n"
    )

    rows = plugins.rows_of("k", "rows_d:rows", {})
    assert rows == [{"id": i, "tags": list(range(i + 1))} for i in range(3)]


def test_a_row_of_numpy_values_and_tuples_becomes_what_json_would_have(directory):
    (directory / "rows_e.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    yield {'answer': np.int64(3), 'level': np.float32(0.1), 'low': np.array(0.1, 'f4'),\n"
        "           'id': np.str_('a'), 'ok': np.bool_(True), 'grid': np.array([[1, 2], [3, 4]]),\n"
        "           'day': np.datetime64('2024-07-26T10:00:00', 'ns'),\n"
        "           'messages': ({'role': 'user', 'content': 'b'},)}\n"
    )

    (row,) = plugins.rows_of("k", "rows_e:rows", {})

    expected = {
        "answer": 3,
        "level": 0.1,
        "low": 0.1,
        "id": "a",
        "ok": True,
        "grid": [[1, 2], [3, 4]],
        "day": "2024-07-26T10:00:00.000000000",
        "messages": [{"role": "user", "content": "b"}],
    }
    assert json.dumps(row) == json.dumps(expected)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("yield {'prompt': 'a'}\n    raise OSError('no disk')", "raised OSError: no disk"),
        ("yield {'prompt': 'a'}\n    yield 'b'", "row 2 is str"),
        ("return 3", "returned a value of type int; it must yield rows"),
        ("yield {'prompt': 'a', 5: 6}", "row 1 has a column 5; names of columns are text"),
        ("yield {'f': lambda: 1}", "row 1 holds what cannot be copied to another process: "),
        ("row = {}\n    row['row'] = row\n    yield row", "row 1 is nested too deeply, or holds"),
    ],
)
def test_a_data_function_that_fails_is_named(directory, body, words):
    (directory / "rows_b.py").write_text(f"def rows():\n    {body}\n")

    with pytest.raises(ConfigError, match=r"prompts\.data\.function: rows_b:rows: ") as caught:
        plugins.rows_of("prompts.data.function", "rows_b:rows", {})

    assert words in str(caught.value)


def test_what_is_raised_in_a_library_is_blamed_on_the_line_that_called_it(directory):
    (directory / "rows_f.py").write_text(
        "import json\n\ndef rows():\n    yield {'prompt': json.loads('{')}\n"
    )

    with pytest.raises(ConfigError) as caught:
        plugins.rows_of("k", "rows_f:rows", {})

    assert "raised JSONDecodeError: " in str(caught.value)
    assert str(caught.value).endswith(f"({directory / 'rows_f.py'}:4)")


def test_a_function_without_parameters_is_no_data_function_with_some(directory):
    (directory / "rows_c.py").write_text("def rows(path): pass\n")

    with pytest.raises(ConfigError, match="called with no argument: missing a required argument"):
        plugins.load("k", "rows_c:rows", DataFunction, {})


def test_a_cause_can_be_written_whatever_a_function_has_read():
    cause = ascii(cause_of(ValueError("cannot read caf\udce9.txt")))
    assert cause == r"'raised ValueError: cannot read caf\\udce9.txt'"
