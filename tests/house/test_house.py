"""Guards of the house rules in CONTRIBUTING.md."""

import ast
import itertools
import json
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from eopd.config import Config, load_config

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "eopd").rglob("*.py"))
KNOBS = Path(__file__).with_name("knobs.txt")

# --- size of the code

MAX_FILE_LINES, MAX_FILE_STATEMENTS, MAX_FUNCTION_LINES, MAX_NESTING = 500, 250, 60, 3
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


def long_functions(tree):
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES]


def nesting(node, depth=0):
    """Deepest block below ``node``. An elif is no deeper than its if; a nested function or
    class starts at zero.
    """
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and child.col_offset == node.col_offset
        )
        inner = (
            0
            if isinstance(child, (*FUNCTIONS, ast.ClassDef))
            else depth + (isinstance(child, BLOCKS) and not is_elif)
        )
        deepest = max(deepest, nesting(child, inner))

    return deepest


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_flat(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= MAX_FILE_STATEMENTS
    assert long_functions(tree) == [], f"functions of more than {MAX_FUNCTION_LINES} lines"
    assert nesting(tree) <= MAX_NESTING


# --- light imports


def test_config_types_roles_and_pipeline_load_nothing_heavy():
    heavy = {"torch", "ray", "vllm", "deepspeed", "transformers"}
    program = (
        "import json, sys, eopd.config, eopd.types, eopd.roles, eopd.pipeline; "
        "print(json.dumps(list(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert heavy.isdisjoint(json.loads(result.stdout))


# --- configuration


def knobs(model, prefix=""):
    """Dotted names of every key a user can set; list items are ``[]``, members of a union
    share their common keys.
    """
    names = set()
    for name, field in model.model_fields.items():
        sections, is_list = sections_of(field.annotation)
        if not sections:
            names.add(f"{prefix}{name}")

        for section in sections:
            names |= knobs(section, f"{prefix}{name}{'[]' if is_list else ''}.")

    return names


def sections_of(annotation):
    """(config sections inside an annotation, whether they stand in a tuple or list)."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return ([annotation] if issubclass(annotation, BaseModel) else []), False

    found = [sections_of(argument) for argument in typing.get_args(annotation)]
    is_list = typing.get_origin(annotation) in (tuple, list) or any(inner for _, inner in found)
    return [section for sections, _ in found for section in sections], is_list


def test_the_names_of_the_knobs_are_frozen():
    """A knob is a promise. After a wanted change, copy what this test prints into
    tests/house/knobs.txt.
    """
    actual = "\n".join(sorted(knobs(Config))) + "\n"
    assert KNOBS.read_text(encoding="utf-8") == actual, f"tests/house/knobs.txt must be:\n{actual}"


def test_there_are_few_knobs():
    assert len(knobs(Config)) <= 160


def config_files():
    return sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.name)
def test_every_config_is_valid_short_and_says_how_to_run_it(path):
    load_config(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    header = itertools.takewhile(lambda line: line.startswith("#"), lines)
    assert len(lines) <= 50
    assert f"eopd train {path.relative_to(ROOT)}" in "\n".join(header), (
        "the header comment holds the exact command"
    )


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.name)
def test_a_config_for_gpus_says_that_it_was_not_run_and_what_it_expects(path):
    config = load_config(path)
    roles = (config.learner, config.rollout, *config.teachers)
    header = path.read_text(encoding="utf-8").partition("\nrun:")[0]
    for words in ("NOT YET RUN on GPUs", "Expected: "):
        assert (words in header) == any(role.gpus for role in roles)


# --- README


def fences(text):
    """(language, number of the first line inside, lines) of every fenced block."""
    lines, found, start = text.splitlines(), [], None
    for index, line in enumerate(lines):
        if not line.startswith("```"):
            continue

        if start is None:
            start = index
        else:
            found.append((lines[start][3:].strip(), start + 2, lines[start + 1 : index]))
            start = None

    return found


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_starts_with_a_command():
    assert len(readme().splitlines()) <= 110
    first = [
        start
        for language, start, lines in fences(readme())
        if language in ("bash", "sh", "console") and lines
    ]
    assert first and first[0] <= 30, "the first ```bash block stands within 30 lines"


# --- the whole tree

# Built from parts, so that this file is held to the rule too.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.}-])/(?:"
    + "|".join(["work", "root", "home/[a-z]+", "Users"])
    + r")/",
    "an index of one machine": "file:" + r"///|(?:PIP|UV)_\w*INDEX\w*=|find-links[ =]/",
    "a package index (PyTorch's CPU index apart)": (
        r"index-url[ =]+(?!https://download\.pytorch\.org/whl/cpu)\S|" + r"pypi\." + "org"
    ),
    "unfinished work": r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b",
}


def tracked_files():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def forbidden_in(text):
    return [
        (reason, match.group())
        for reason, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text)
    ]


def test_slow_tests_are_where_the_slow_tier_looks_for_them():
    files = [*(ROOT / "tests/unit").rglob("*.py"), *(ROOT / "tests/house").rglob("*.py")]
    assert not [file for file in files if "mark." + "slow" in file.read_text()]


def test_no_machine_paths_indexes_or_loose_ends():
    found = {}
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures

        if hits := forbidden_in(text):
            found[str(path.relative_to(ROOT))] = hits

    assert found == {}


def test_the_forbidden_patterns_match_what_they_are_for():
    bad = [
        "see /work" + "/main/x",
        "/home" + "/anna/models",
        "--find-links" + " /opt/wheels",
        "--extra-index-url" + " https://example.org/simple",
        "# TO" + "DO: later",
    ]
    assert all(forbidden_in(text) for text in bad)
    good = [
        "--index-url" + " https://download.pytorch.org/whl/cpu",
        "a network/",
        "runs/" + "work/",
        "${HOME}/models",
    ]
    assert not any(forbidden_in(text) for text in good)
