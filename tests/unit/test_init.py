"""``eopd init``: a recipe, its prompts and the schema in an empty folder, never over what is
there.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import eopd
from eopd.cli.init import RECIPES, recipe_names, write_recipe
from eopd.cli.main import main
from eopd.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]


def init(monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eopd", "init", *arguments])
    main()


def test_the_package_runs_as_a_program():
    said = subprocess.check_output([sys.executable, "-m", "eopd", "--version"], text=True)
    assert said.strip() == eopd.__version__


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_recipes_of_the_package_are_those_of_the_repository():
    assert contents(RECIPES) == contents(ROOT / "configs")
    assert {"tiny", "demo", "math"} <= set(recipe_names())


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("*.yaml"))])
def test_a_written_recipe_loads_and_finds_its_prompts(name, tmp_path, monkeypatch):
    _, command = write_recipe(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command.endswith(f"eopd train configs/{name}.yaml")
    prompts = load_config(Path(f"configs/{name}.yaml")).prompts
    first_line = (tmp_path / f"configs/{name}.yaml").read_text().partition("\n")[0]
    assert first_line == "# yaml-language-server: $schema=schema.json"
    assert (tmp_path / "configs/schema.json").is_file()
    for spec in (prompts.data, prompts.held_out):
        assert not Path(spec).is_relative_to(tmp_path / "configs") or Path(spec).is_file()


def test_it_says_what_it_wrote_and_what_comes_next(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        init(monkeypatch, tmp_path, "tiny")

    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote configs/tiny.yaml",
        "wrote configs/prompts/demo_train.jsonl",
        "wrote configs/prompts/demo_held_out.jsonl",
        "wrote configs/schema.json",
        "next: eopd models tiny && eopd train configs/tiny.yaml",
    ]
    assert contents(tmp_path) == {
        name: (ROOT / name).read_bytes()
        for name in (
            "configs/tiny.yaml",
            "configs/prompts/demo_train.jsonl",
            "configs/prompts/demo_held_out.jsonl",
            "configs/schema.json",
        )
    }


def test_a_second_recipe_shares_what_is_there_already(tmp_path):
    write_recipe("tiny", tmp_path)
    assert write_recipe("demo", tmp_path)[0] == [Path("configs/demo.yaml")]
    assert write_recipe("demo", tmp_path)[0] == []


@pytest.mark.parametrize("changed", ["configs/tiny.yaml", "configs/prompts/demo_held_out.jsonl"])
def test_a_file_of_the_user_is_never_overwritten(changed, tmp_path, monkeypatch, capsys):
    (tmp_path / changed).parent.mkdir(parents=True)
    (tmp_path / changed).write_text("mine")
    with pytest.raises(SystemExit) as end:
        init(monkeypatch, tmp_path, "tiny")

    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {changed}: exists and differs from the recipe's"
    )
    assert contents(tmp_path) == {changed: b"mine"}


def test_an_unknown_recipe_and_a_folder_in_the_way_are_one_message(tmp_path):
    with pytest.raises(
        ConfigError, match=r"init tyni: there is no such recipe; choose one of demo, math, .*tiny"
    ):
        write_recipe("tyni", tmp_path)

    (tmp_path / "configs").write_text("a file")
    with pytest.raises(ConfigError, match=r"configs/tiny\.yaml: cannot be written"):
        write_recipe("tiny", tmp_path)
