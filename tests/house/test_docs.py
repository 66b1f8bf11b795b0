"""What README and docs/ show exists: commands, options, links, and configuration keys."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from eopd.cli.main import app
from eopd.config import Config, LearnerConfig
from eopd.config.base import Section
from eopd.config.loss import HardGate

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("cluster/*.md"),
    ]
)
KNOBS = (Path(__file__).with_name("knobs.txt")).read_text(encoding="utf-8").split()
# Names of the shape `section.key` that are no keys: of other programs, of Python, of files.
SECTIONS = sorted({name.split(".")[0].removesuffix("[]") for name in KNOBS})
FILE_SUFFIXES = {
    "py",
    "json",
    "jsonl",
    "html",
    "yaml",
    "yml",
    "md",
    "lock",
    "sh",
    "txt",
    "css",
    "js",
}

pages = pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: str(page.relative_to(ROOT)),
)


def code_of(text: str) -> str:
    """Lines of every code block, fenced or indented by four; a line that ends in a backslash
    goes on in the next.
    """
    code, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())

    return "\n".join(code).replace("\\\n", " ")


# --- commands --------------------------------------------------------------------------------------------------------

COMMAND = typer.main.get_command(app)


def wrong_commands(text: str) -> list[str]:
    """What is wrong with each ``eopd`` command of the code blocks of a page."""
    found = []
    for line in code_of(text).splitlines():
        for part in re.split(r"&&|\|\||;|\|", line.split("#")[0]):
            if match := re.search(r"(?:^|[\s/])(?:eopd|python -m eopd)\s+(.*)", part):
                found += wrong_arguments(match.group(1))

    return found


def wrong_arguments(text: str) -> list[str]:
    words, command = shlex.split(text), COMMAND
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        verb = words.pop(0)
        if verb not in command.commands:
            return [f"eopd {text}: there is no verb {verb}"]

        command = command.commands[verb]

    options = {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]

    return [
        f"eopd {text}: there is no option {name}"
        for name in given
        if name not in {*options, "--help"}
    ]


@pages
def test_commands_in_code_blocks_exist(page):
    assert wrong_commands(page.read_text(encoding="utf-8")) == []


@pages
def test_make_verbs_in_code_blocks_exist(page):
    verbs = set(
        re.findall(
            r"^([a-z]+):",
            (ROOT / "Makefile").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    code = code_of(page.read_text(encoding="utf-8"))
    assert set(re.findall(r"(?:^|&& )make ([a-z]+)", code, re.MULTILINE)) <= verbs


@pages
def test_configs_in_code_blocks_exist(page):
    named = re.findall(r"\bconfigs/[\w./-]+", code_of(page.read_text(encoding="utf-8")))
    assert [name for name in named if not (ROOT / name).exists()] == []


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(
            r"[^\w\- ]",
            "",
            heading.lower(),
        ).replace(" ", "-")
        for heading in headings
    }


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"[a-z]+:", link):
            continue

        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            broken.append(link)

    return broken


@pages
def test_relative_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


FOLDERS = ("eopd", "tests", "docs", "cluster", "configs", "dashboards")


def missing_files(text: str) -> list[str]:
    """Files and folders of the repository that a page names in backticks and that are not there."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    return [name for name in named if not (ROOT / name).exists()]


@pages
def test_files_in_backticks_exist(page):
    assert missing_files(page.read_text(encoding="utf-8")) == []


# --- configuration keys ----------------------------------------------------------------------------------------------


def unknown_keys(text: str) -> list[str]:
    """Names in backticks of the form ``section.key`` that are no configuration key, nor the
    beginning of one.
    """
    known = {name.replace("[]", "") for name in KNOBS}
    beginnings = {
        ".".join(name.split(".")[:length])
        for name in known
        for length in range(1, name.count(".") + 2)
    }
    native = ("rollout.vllm.", "teachers.vllm.", "learner.deepspeed.", "teachers.template_options.")
    unknown = []

    for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\[\])?\.[\w.\[\]]+)", text):
        plain = re.sub(r"\.\d+\b", "", name.replace("[]", "")).rstrip(".")
        if (
            plain.rpartition(".")[2] not in FILE_SUFFIXES
            and plain not in beginnings
            and not plain.startswith(native)
        ):
            unknown.append(name)

    return unknown


@pages
def test_keys_in_backticks_exist(page):
    assert unknown_keys(page.read_text(encoding="utf-8")) == []


REFERENCE = runpy.run_path(str(ROOT / "docs/reference.py"))
SECTION_TYPES = [
    Config,
    *(form for chapter in REFERENCE["chapters"](Config) for form in chapter.forms.values()),
]


def test_the_reference_page_and_the_schema_are_what_the_sections_say():
    rendered = REFERENCE["render"]()
    assert set(rendered) == {"docs/configuration-reference.md", "configs/schema.json"}
    written = {name: (ROOT / name).read_text(encoding="utf-8") for name in rendered}
    assert written == rendered, "make reference"


def test_every_key_is_described():
    text = (ROOT / "docs/configuration-reference.md").read_text(encoding="utf-8")
    assert [name for name in KNOBS if f"`{name}`" not in text] == []


def test_every_section_is_in_the_reference():
    assert set(SECTION_TYPES) == set(subclasses(Section))


def subclasses(section):
    for child in section.__subclasses__():
        if child.__module__.startswith("eopd."):  # tests make some too
            yield child

        yield from subclasses(child)


@pytest.mark.parametrize("section", SECTION_TYPES, ids=lambda section: section.__name__)
def test_every_field_has_a_description_in_sentences(section):
    texts = REFERENCE["descriptions"](section)
    assert texts.keys() == section.model_fields.keys()
    assert {name: text for name, text in texts.items() if not is_sentence(text)} == {}


def is_sentence(text: str) -> bool:
    """Whether a text begins with a capital letter, ends with a full stop, and has three words."""
    return re.fullmatch(r"[A-Z][^\n]*\.", text) is not None and len(text.split()) >= 3


def test_a_description_is_what_stands_beneath_its_field():
    learner = REFERENCE["descriptions"](LearnerConfig)
    assert learner["warmup_batches"] == (
        "The number of batches over which the learning rate grows to `learner.lr`."
    )
    gate = REFERENCE["descriptions"](HardGate)
    assert list(gate) == ["kind", "tau"] and gate["kind"].startswith("The gate of the paper: ")
    assert not any(map(is_sentence, ["", "Of AdamW", "of AdamW.", "Of AdamW."]))


# --- the checks themselves -------------------------------------------------------------------------------------------


def test_the_path_of_a_prompt_has_at_most_thirty_stations():
    page = (ROOT / "docs/architecture.md").read_text()
    walk = page.partition("## One prompt, file by file")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in walk.splitlines() if line.startswith("| ")]
    stations, others = (
        set(re.findall(r"`((?:\w+/)*\w+\.py)`", " ".join(row[column] for row in rows)))
        for column in (2, 4)
    )
    there = [f"/{path.relative_to(ROOT / 'eopd')}" for path in (ROOT / "eopd").rglob("*.py")]
    for name in stations | others:
        assert any(path.endswith(f"/{name}") for path in there), name

    assert 20 < len(stations) <= 30


def test_the_checks_find_what_they_are_for(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page, `of` two words\n")
    assert wrong_commands("    eopd tarin x.yaml") == ["eopd tarin x.yaml: there is no verb tarin"]
    assert wrong_commands("```\na && .venv/bin/eopd train x.yaml --rseume  # --no\n```") != []
    assert wrong_commands("    eopd teacher serve x.yaml --port 1 \\\n      --nothing") != []
    assert (
        wrong_commands("    eopd eval m d --n 8 --k 1\n    eopd models tiny && eopd --version")
        == []
    )
    assert broken_links(
        page, "[a](b.md) [c](#a-page-of-two-words) [d](page.md#no) [e](https://x.y)"
    ) == [
        "b.md",
        "page.md#no",
    ]
    assert missing_files("`eopd/types.py`, `eopd/type.py`, `configs/` and `configs/*.yaml`") == [
        "eopd/type.py"
    ]
    assert unknown_keys(
        "`flow.max_stalenes` and `learner.lr: 1`, `teachers[].eos_remap`, `loss.gate.kind: hard`"
    ) == ["flow.max_stalenes"]
