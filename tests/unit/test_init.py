"""``eopd init``: a recipe, its prompts and the schema in an empty folder, never over what is
there.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from eopd import __version__
from eopd.cli.init import RECIPES, recipe_names, write_recipe
from eopd.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]


def test_the_package_runs_as_a_program():
    said = subprocess.check_output([sys.executable, "-m", "eopd", "--version"], text=True)
    assert said.strip() == __version__


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_recipes_of_the_package_are_those_of_the_repository():
    assert contents(RECIPES) == contents(ROOT / "configs")
    assert {"tiny", "demo", "math"} <= set(recipe_names())


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_a_written_recipe_loads_and_finds_its_prompts(name, tmp_path, monkeypatch):
    _, command = write_recipe(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command.endswith(f"eopd train configs/{name}.yaml")
    prompts = load_config(Path(f"configs/{name}.yaml")).prompts
    first_line = (tmp_path / f"configs/{name}.yaml").read_text().partition("\n")[0]
    assert first_line == "# yaml-language-server: $schema=schema.json"
    assert (tmp_path / "configs/schema.json").is_file()
    for part in (*prompts.data, *prompts.held_out):
        elsewhere = not Path(part.data).is_relative_to(tmp_path / "configs")
        assert elsewhere or Path(part.data).is_file()


def test_rows_that_a_recipe_does_not_bring_are_to_be_made_first(eopd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = "data/math_train.jsonl and data/math_held_out.jsonl"
    *_, first, last = eopd("init", "qwen3-0.6b-math").out.splitlines()
    assert first.startswith(f"first make {files} (your rows, which no recipe brings: docs/")
    assert last == "next: eopd train configs/qwen3-0.6b-math.yaml"
    (tmp_path / "data").mkdir()
    for name in ("math_train", "math_held_out"):
        (tmp_path / f"data/{name}.jsonl").touch()

    assert "first" not in eopd("init", "qwen3-0.6b-math").out


def test_it_says_what_it_wrote_and_what_comes_next(eopd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = eopd("init", "tiny")
    assert done.code == 0
    assert done.out.splitlines() == [
        "wrote configs/tiny.yaml",
        "wrote configs/prompts/demo_train.jsonl",
        "wrote configs/prompts/demo_held_out.jsonl",
        "wrote configs/schema.json",
        "next: eopd models tiny && eopd train configs/tiny.yaml",
    ]
    written = contents(tmp_path)
    assert written.keys() == {
        "configs/tiny.yaml",
        "configs/schema.json",
        "configs/prompts/demo_train.jsonl",
        "configs/prompts/demo_held_out.jsonl",
    }
    for name, content in written.items():
        assert content == (ROOT / name).read_bytes()


def test_the_recipes_that_one_extends_are_written_with_it(tmp_path):
    written, _ = write_recipe("one-node-8-gpus", tmp_path)
    assert written == [
        Path("configs/one-node-8-gpus.yaml"),
        Path("configs/paper-qwen3-4b.yaml"),
        Path("configs/paper-qwen3-0.6b.yaml"),
        Path("configs/schema.json"),
    ]
    assert write_recipe("paper-qwen3-1.7b", tmp_path)[0] == [Path("configs/paper-qwen3-1.7b.yaml")]


def test_a_second_recipe_shares_what_is_there_already(tmp_path):
    write_recipe("tiny", tmp_path)
    assert write_recipe("demo", tmp_path)[0] == [Path("configs/demo.yaml")]
    assert write_recipe("demo", tmp_path)[0] == []


@pytest.mark.parametrize(
    "changed",
    [
        "configs/tiny.yaml",
        "configs/prompts/demo_held_out.jsonl",
    ],
)
def test_a_file_of_the_user_is_never_overwritten(eopd, changed, tmp_path, monkeypatch):
    (tmp_path / changed).parent.mkdir(parents=True)
    (tmp_path / changed).write_text("mine")
    monkeypatch.chdir(tmp_path)
    done = eopd("init", "tiny")
    assert done.code == 2
    assert done.err.startswith(f"error: {changed}: exists and differs from the recipe's")
    assert contents(tmp_path) == {changed: b"mine"}


def test_an_unknown_recipe_and_a_folder_in_the_way_are_one_message(tmp_path):
    unknown = r"init tyni: there is no such recipe; choose one of demo, .*math, .*tiny"
    with pytest.raises(ConfigError, match=unknown):
        write_recipe("tyni", tmp_path)

    (tmp_path / "configs").write_text("a file")
    with pytest.raises(ConfigError, match=r"configs/tiny\.yaml: cannot be written"):
        write_recipe("tiny", tmp_path)
