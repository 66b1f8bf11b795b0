"""What the paths of a config stand for: the same contents are the same run, whatever their
names.
"""

import json
import shutil

import fakes
import pytest
from safetensors.numpy import load_file, save_file

from eopd import preflight
from eopd.config import load_config
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.runtime.inputs import digests

ROWS = [
    {"id": "r0", "prompt": "few words 0", "answer": "0", "source": "s"},
    {"id": "r1", "prompt": "few words 1", "answer": "1", "source": "s"},
    {"id": "r2", "prompt": "few words 2", "answer": "2", "source": "s"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 270)
    for name in ("student", "teacher"):
        write_model(
            root / name,
            build_model("qwen3", tokenizer, seed=0, layers=1),
            tokenizer,
        )

    return root


@pytest.fixture
def of(models, tmp_path):
    """The digests of a run in a folder, its data written anew, after a change to the folder."""

    def make(name, train=ROWS, held_out=ROWS, change=lambda root: None, *overrides):
        root = tmp_path / name
        shutil.copytree(models, root)
        for file, rows in (("train", train), ("held_out", held_out)):
            lines = [json.dumps(row) + "\n" for row in rows]
            (root / f"{file}.jsonl").write_text("".join(lines))

        change(root)
        data = f"data: {root}/train.jsonl, held_out: {root}/held_out.jsonl"
        path = fakes.write_config(
            root,
            batches=1,
            student=f"{{model: {root}/student}}",
            teachers=f"[{{model: {root}/teacher, name: t}}]",
            prompts=f"{{{data}, max_tokens: 64}}",
            flow="{batch_prompts: 1}",
        )
        config = load_config(path, overrides)
        return digests(config, preflight.prepare(config))

    return make


def edit(file, **changes):
    def change(root):
        path = root / file
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | changes))

    return change


def written_again(root):
    path = root / "teacher" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": "other weights"})


pad_left = edit("teacher/tokenizer_config.json", padding_side="left")


def with_first(**changes):
    """The rows, the first one changed."""
    first, *others = ROWS
    return [first | changes, *others]


def different(before, after):
    return {key for key in before if before[key] != after[key]}


def test_what_was_moved_is_the_same(of):
    first, second = of("first"), of("second")
    assert first == second
    assert set(first) == {
        "made_as",
        "prompts.data",
        "prompts.held_out",
        "student.model",
        "teachers.t.model",
    }


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [
        ({"train": ROWS[::-1]}, {"prompts.data"}),
        ({"train": ROWS[:2]}, {"prompts.data"}),
        ({"train": with_first(id="other")}, {"prompts.data"}),
        ({"train": with_first(answer="7")}, {"prompts.data"}),
        ({"train": with_first(source="x")}, {"prompts.data"}),
        ({"train": with_first(prompt="few words 7")}, {"prompts.data"}),
        ({"train": with_first(note="not read")}, set()),
        ({"held_out": ROWS[:2]}, {"prompts.held_out"}),
        ({"change": edit("student/config.json", transformers_version="9")}, set()),
        ({"change": edit("student/config.json", rope_theta=7.0)}, {"student.model"}),
        ({"change": edit("teacher/config.json", rope_theta=7.0)}, {"teachers.t.model"}),
        ({"change": written_again}, {"teachers.t.model"}),
        ({"change": pad_left}, {"teachers.t.model"}),
    ],
)
def test_a_digest_tells_what_is_trained_on_and_by_what(of, arguments, differs):
    before = of("before")
    after = of("after", **arguments)
    assert different(before, after) == differs


def test_every_part_has_a_digest_and_weights_have_none(of, tmp_path):
    def parts(name, weight, second="held_out"):
        files = [f"{tmp_path}/{name}/{file}.jsonl" for file in ("train", second)]
        text = ", ".join(f"{{data: {file}, weight: {weight}}}" for file in files)
        return of(name, ROWS, ROWS, lambda root: None, f"prompts.data=[{text}]")

    before = parts("before", 1)
    assert before.keys() >= {"prompts.data", "prompts.data.0", "prompts.data.1"}
    assert before["prompts.data.0"] != before["prompts.data.1"]  # their ids differ
    assert parts("heavier", 2) == before

    rows = "".join(json.dumps(row) + "\n" for row in ROWS[:2])
    (tmp_path / "other.jsonl").write_text(rows)
    after = parts("after", 1, second="../other")
    assert different(before, after) == {"prompts.data", "prompts.data.1"}


def test_a_suffix_makes_other_prompts(of):
    before = of("before")
    after = of("after", ROWS, ROWS, lambda root: None, "prompts.suffix= words")
    assert different(before, after) == {"prompts.data", "prompts.held_out"}
